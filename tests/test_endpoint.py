"""The endpoint engine against an HTTP server whose behaviour each test scripts."""

import json
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipelines.engines import Completion, Request
from pipelines.engines.endpoint import EndpointEngine
from pipelines.errors import UserError
from pipelines.recipe import Teacher

pytestmark = pytest.mark.slow

KEY = "sk-proj-A1b2C3d4E5f6G7h8"
VARIABLE = "SCRIPTED_SERVER_KEY"

Body = dict[str, Any]


@dataclass
class Reply:
    status: int = 200
    body: Body | str = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class ScriptedServer:
    """Answers as `script` says; keeps what it was asked."""

    script: Callable[[Body], Reply]
    models: Reply = field(default_factory=lambda: Reply(body={"data": [{"id": "teacher"}, {"id": "teachers-pet"}]}))
    asked: list[Body] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self._write(scripted.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with scripted._lock:
                    scripted.asked.append(body)
                    scripted.paths.append(self.path)
                    scripted.keys.add(self.headers["Authorization"])
                    scripted._at_once += 1
                    scripted.most_at_once = max(scripted.most_at_once, scripted._at_once)
                try:
                    reply = scripted.script(body)
                finally:
                    with scripted._lock:
                        scripted._at_once -= 1
                self._write(reply)

            def _write(self, reply: Reply) -> None:
                is_json = not isinstance(reply.body, str)
                content = (json.dumps(reply.body) if is_json else str(reply.body)).encode()
                self.send_response(reply.status)
                headers = {"Content-Type": "application/json" if is_json else "text/html"} | reply.headers
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that hung up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def said(text: str | None = None, **choice: Any) -> Reply:
    """A completion as vLLM gives it."""
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return Reply(body={"choices": [{"index": 0, "text": text, "finish_reason": "stop"} | choice], "usage": usage})


def error(status: int, message: str, headers: dict[str, str] | None = None, **more: Any) -> Reply:
    return Reply(status, {"error": {"message": message, **more}}, headers or {})


def is_hello(body: Body) -> bool:
    """Whether this is the question by which an engine finds out whose fault a failure was."""
    return body.get("prompt") == "Hello"


Serve = Callable[[Callable[[Body], Reply]], ScriptedServer]
MakeEngine = Callable[..., EndpointEngine]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setenv(VARIABLE, KEY)
    servers: list[ScriptedServer] = []

    def start(script: Callable[[Body], Reply]) -> ScriptedServer:
        servers.append(ScriptedServer(script))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    engines: list[EndpointEngine] = []

    def make(server: ScriptedServer, stop: tuple[str, ...] = (), **settings: Any) -> EndpointEngine:
        engines.append(EndpointEngine(teacher_at(server.url, **settings), stop))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def teacher_at(url: str, **settings: Any) -> Teacher:
    names = ("concurrency", "requests_per_minute", "timeout_s", "retries")
    endpoint = {name: settings.pop(name) for name in names if name in settings}
    return Teacher.model_validate(
        {
            "engine": "openai",
            "model": "teacher",
            "endpoint": {"url": url, "api_key_env": VARIABLE, "timeout_s": 20, "retries": 0, **endpoint},
            **settings,
        }
    )


def ask(engine: EndpointEngine, *prompts: str) -> list[Completion]:
    return engine.generate([Request(prompt) for prompt in prompts])


def test_completions_come_back_in_order_with_their_counts(serve: Serve, make_engine: MakeEngine) -> None:
    odd = ["a", "Übergröße 🧾 \x00", "漢字\u2028", "x" * 200_000, ""]
    server = serve(lambda body: said("re: " + body["prompt"]))
    done = ask(make_engine(server), *odd)
    assert [c.text for c in done] == ["re: " + prompt for prompt in odd]
    assert {(c.finish_reason, c.error, c.input_tokens, c.output_tokens) for c in done} == {("stop", None, 7, 3)}
    assert {c.cached_tokens for c in done} == {None}
    assert set(server.paths) == {"/v1/completions"}
    assert ask(make_engine(server)) == []


def test_the_recipes_settings_reach_the_server(serve: Serve, make_engine: MakeEngine) -> None:
    server = serve(lambda body: said("yes"))
    engine = make_engine(server, stop=("\n\nQ:",), temperature=0.7, top_p=0.9, max_tokens=33)
    engine.generate([Request("Q", seed=5, structure="{}")])
    ask(make_engine(server), "Q")
    assert server.asked[0] == {
        "model": "teacher",
        "prompt": "Q",
        "max_tokens": 33,
        "temperature": 0.7,
        "top_p": 0.9,
        "stop": ["\n\nQ:"],
        "seed": 5,
        "structured_outputs": {"structural_tag": "{}"},
    }
    assert server.asked[1].keys() == {"model", "prompt", "max_tokens", "temperature", "top_p"}
    assert server.keys == {f"Bearer {KEY}"}


def test_a_chat_puts_the_thinking_part_before_the_answer(serve: Serve, make_engine: MakeEngine) -> None:
    thoughts: list[Body] = [{"reasoning": None}, {"reasoning_content": "Well."}, {"reasoning": "Hm."}]
    server = serve(lambda body: said(message={"role": "assistant", "content": "Yes.", **thoughts.pop()}))
    engine = make_engine(server, prompt="chat", chat_template_args={"enable_thinking": True}, concurrency=1)
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"})
    done = engine.generate([Request(messages)] * 3)
    assert [c.text for c in done] == ["<think>Hm.</think>Yes.", "<think>Well.</think>Yes.", "Yes."]
    assert server.paths[0] == "/v1/chat/completions"
    assert server.asked[0]["messages"] == list(messages)
    assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": True}


def test_parameters_that_a_reasoning_model_refuses_are_done_without(serve: Serve, make_engine: MakeEngine) -> None:
    def script(body: Body) -> Reply:
        for name in ("max_tokens", "stop", "top_p"):
            if name in body:
                message = f"Unsupported parameter: '{name}' is not supported with this model."
                return error(400, message, param=name, code="unsupported_parameter")
        return said(str(body["max_completion_tokens"]))

    server = serve(script)
    engine = make_engine(server, stop=("\n",), max_tokens=12)
    assert {c.text for c in ask(engine, *"abcdefgh")} == {"12"}
    before = len(server.asked)
    ask(engine, "i")
    assert len(server.asked) == before + 1
    with pytest.raises(UserError, match="top_p"):
        ask(make_engine(server, top_p=0.9), "a")


def test_finish_reasons(serve: Serve, make_engine: MakeEngine) -> None:
    server = serve(lambda body: said("text", finish_reason=json.loads(body["prompt"])))
    done = ask(make_engine(server), '"stop"', '"length"', '"content_filter"', "null")
    assert [c.finish_reason for c in done] == ["stop", "length", "error", "error"]
    assert done[2].error == "the server ended the text with 'content_filter'"
    assert [c.text for c in done] == ["text"] * 4


@pytest.mark.parametrize(
    "refusal",
    [
        error(
            400,
            "This model's maximum context length is 1024 tokens. However, you requested 256 output tokens",
            code=400,
        ),
        error(400, "Too much.", code="context_length_exceeded"),
        error(400, "the request exceeds the available context size", type="exceed_context_size_error"),
        error(413, "prompt is too long: 300000 tokens > 200000 maximum"),
        Reply(422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096"}),
    ],
)
def test_a_prompt_beyond_the_context_is_too_long(serve: Serve, make_engine: MakeEngine, refusal: Reply) -> None:
    server = serve(lambda body: refusal if body["prompt"] == "long" else said("fine"))
    done = ask(make_engine(server), "long", "short")
    assert [c.finish_reason for c in done] == ["too_long", "stop"]
    assert done[0].error
    assert len(server.asked) == 2


def test_max_tokens_that_fill_the_context_are_the_recipes_fault(serve: Serve, make_engine: MakeEngine) -> None:
    server = serve(lambda body: error(400, "max_tokens is too large: the maximum context length is 64"))
    with pytest.raises(UserError, match=r"teacher\.max_tokens 256 leaves no room"):
        make_engine(server).check()


def test_errors_that_pass_are_tried_again(serve: Serve, make_engine: MakeEngine) -> None:
    failures = [error(status, "busy", {"retry-after-ms": "1"}) for status in (408, 409, 429, 500, 503)]
    server = serve(lambda body: failures.pop() if failures else said("at last"))
    done = ask(make_engine(server, retries=5, concurrency=1), "a", "b")
    assert [c.text for c in done] == ["at last"] * 2
    assert len(server.asked) == 7


def test_a_rows_own_failure_spoils_no_other(serve: Serve, make_engine: MakeEngine) -> None:
    bad = {
        "poison": error(500, "the engine\nstumbled"),
        "refused": error(400, "I do not like this row"),
        "garbage": Reply(200, "<html>\n oops</html>"),
        "half": Reply(200, {"choices": []}),
        "slow": said("too late"),
    }

    end = threading.Event()

    def script(body: Body) -> Reply:
        if body["prompt"] == "slow":
            end.wait(20)
        return bad.get(body["prompt"], said("fine"))

    server = serve(script)
    prompts = ["good", *bad, "\ud800", "better"]
    done = dict(zip(prompts, ask(make_engine(server, timeout_s=2), *prompts), strict=True))
    end.set()
    assert {prompt for prompt, c in done.items() if c.finish_reason == "stop"} == {"good", "better"}
    assert done["poison"].error == "500: the engine stumbled"
    assert done["refused"].error == "400: I do not like this row"
    assert "oops" in str(done["garbage"].error)
    assert "no completion" in str(done["half"].error)
    assert "Timeout" in str(done["slow"].error)
    assert all("\n" not in c.error for c in done.values() if c.error)
    assert sum(map(is_hello, server.asked)) <= 6


def test_refusals_of_many_rows_cost_no_further_questions(serve: Serve, make_engine: MakeEngine) -> None:
    server = serve(lambda body: error(400, "no") if body["prompt"] == "bad" else said("fine"))
    engine = make_engine(server)
    ask(engine, "good")
    assert {c.finish_reason for c in ask(engine, *["bad"] * 20)} == {"error"}
    assert len(server.asked) == 21


def test_a_server_that_refuses_everything_is_not_the_rows_fault(serve: Serve, make_engine: MakeEngine) -> None:
    server = serve(lambda body: error(400, "default chat template is no longer allowed"))
    with pytest.raises(UserError, match=r"refuses even a prompt of one word \(400: default chat template"):
        ask(make_engine(server), "a", "b")


@pytest.mark.parametrize(
    ("status", "sentence"), [(401, "refuses the key"), (403, "does not allow"), (404, "not serve")]
)
def test_a_key_or_model_that_is_wrong_is_not_tried_a_million_times(
    serve: Serve, make_engine: MakeEngine, status: int, sentence: str
) -> None:
    server = serve(lambda body: error(status, f"Not with {KEY}"))
    server.models = Reply(body={"data": [{"id": "professor"}]})
    engine = make_engine(server, concurrency=4, retries=3)
    with pytest.raises(UserError, match=sentence):
        ask(engine, *map(str, range(500)))
    with pytest.raises(UserError, match=sentence):
        ask(engine, *map(str, range(500)))
    assert len(server.asked) <= 8  # those under way, and a question after each


def test_a_key_withdrawn_in_mid_run_ends_all_threads(serve: Serve, make_engine: MakeEngine) -> None:
    lock, left = threading.Lock(), [40]

    def script(body: Body) -> Reply:
        with lock:
            left[0] -= 1
            return said("fine") if left[0] >= 0 else error(401, "Unauthorized")

    engine = make_engine(serve(script), concurrency=4)

    def run(_: int) -> None:
        for _ in range(20):
            ask(engine, *"abcdef")

    with ThreadPoolExecutor(3) as threads:
        errors = [future.exception() for future in [threads.submit(run, n) for n in range(3)]]
    assert [type(e) for e in errors] == [UserError] * 3
    assert len({str(e) for e in errors}) == 1


def test_an_endpoint_that_falls_silent_blames_no_row(serve: Serve, make_engine: MakeEngine) -> None:
    lock, left = threading.Lock(), [10]

    def script(body: Body) -> Reply:
        with lock:
            left[0] -= 1
            return said("fine") if left[0] >= 0 else error(503, "no backend")

    engine = make_engine(serve(script), concurrency=4, retries=1)
    with pytest.raises(UserError, match=r"answers nothing but errors \(503: no backend; tries: 2\)"):
        ask(engine, *map(str, range(1000)))


def test_an_endpoint_that_is_only_busy_is_not_given_up(serve: Serve, make_engine: MakeEngine) -> None:
    asked = {prompt: threading.Event() for prompt in ("good", "better", "bad", "Hello")}
    waits_for = {"good": "Hello", "Hello": "better"}  # so that `good` is answered while `Hello` waits

    def script(body: Body) -> Reply:
        prompt = body["prompt"]
        asked[prompt].set()
        if prompt in waits_for:
            asked[waits_for[prompt]].wait(20)
        return said("fine") if prompt in ("good", "better") else error(429, "slow down")

    server = serve(script)
    done = ask(make_engine(server, concurrency=2), "bad", "good", "better")
    assert [c.text for c in done] == ["", "fine", "fine"]
    assert done[0].error == "429: slow down"
    with pytest.raises(UserError, match=r"takes no more requests \(429: slow down; tries: 1\).*requests_per_minute"):
        ask(make_engine(server), "bad")


def test_a_server_that_is_gone_ends_the_engine(serve: Serve, make_engine: MakeEngine) -> None:
    server = serve(lambda body: said("fine"))
    engine = make_engine(server, retries=1)
    ask(engine, "a")
    server.stop()
    server.script = lambda body: error(503, "shut")  # connections that were kept open still reach it
    with pytest.raises(UserError, match="run the same command again"):
        ask(engine, *"abc")


class TestCheck:
    def test_says_nothing_when_all_is_well(self, serve: Serve, make_engine: MakeEngine) -> None:
        server = serve(lambda body: said("Hello yourself."))
        make_engine(server).check()
        assert len(server.asked) == 1

    def test_of_a_chat_asks_as_a_chat(self, serve: Serve, make_engine: MakeEngine) -> None:
        server = serve(lambda body: said(message={"content": "Hello yourself."}))
        make_engine(server, prompt="chat").check()
        assert server.paths == ["/v1/chat/completions"]

    def test_nobody_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(VARIABLE, raising=False)
        with (
            closing(EndpointEngine(teacher_at("http://127.0.0.1:9/v1"), ())) as engine,
            pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1 can't be reached \(.*[Cc]onnect.*tries: 1\)"),
        ):
            engine.check()

    def test_no_answer_in_time(self, serve: Serve, make_engine: MakeEngine) -> None:
        end = threading.Event()
        server = serve(lambda body: said(f"late: {end.wait(20)}"))
        with pytest.raises(UserError, match=r"no answer in time \(ReadTimeout.*timeout_s \(0\.3\)"):
            make_engine(server, timeout_s=0.3).check()
        end.set()

    @pytest.mark.parametrize("status", [401, 403])
    def test_a_key_is_wanted(
        self, serve: Serve, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, status: int
    ) -> None:
        monkeypatch.setenv(VARIABLE, " ")
        server = serve(lambda body: error(status, "Unauthorized"))
        with pytest.raises(UserError, match=f"wants a key: set the environment variable {VARIABLE} "):
            make_engine(server).check()
        assert server.keys == {"Bearer none"}

    def test_a_wrong_key(self, serve: Serve, make_engine: MakeEngine) -> None:
        server = serve(lambda body: error(401, "Unauthorized"))
        with pytest.raises(UserError, match=f"refuses the key of the environment variable {VARIABLE}"):
            make_engine(server).check()

    def test_a_key_with_a_line_break_in_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "sk-one\nsk-two")
        with pytest.raises(UserError, match=VARIABLE) as raised:
            EndpointEngine(teacher_at("http://127.0.0.1:9/v1"), ())
        assert "sk-" not in str(raised.value)

    def test_an_unknown_model_names_those_that_are_served(self, serve: Serve, make_engine: MakeEngine) -> None:
        server = serve(lambda body: error(404, "The model `taecher` does not exist."))
        with pytest.raises(UserError, match=r"not serve the teacher\.model 'taecher', but teacher, teachers-pet"):
            make_engine(server, model="taecher").check()

    @pytest.mark.parametrize("models", [Reply(404, "Not Found"), Reply(200, "<html>"), Reply(200, {"data": [{}]})])
    def test_a_wrong_path(self, serve: Serve, make_engine: MakeEngine, models: Reply) -> None:
        server = serve(lambda body: Reply(404, {"detail": "Not Found"}))
        server.models = models
        with pytest.raises(UserError, match=r"teacher\.endpoint\.url end in /v1"):
            make_engine(server).check()

    def test_something_else_answers_there(self, serve: Serve, make_engine: MakeEngine) -> None:
        server = serve(lambda body: Reply(200, "<html>Welcome to the router</html>"))
        with pytest.raises(UserError, match=r"no OpenAI-style endpoint, .*Welcome to the router"):
            make_engine(server).check()


@pytest.mark.parametrize("echo", [KEY, "sk-proj-********G7h8", "sk-proj-...G7h8", "sk-proj-…7h8"])
def test_the_key_is_never_shown(
    serve: Serve, make_engine: MakeEngine, echo: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    bad = error(400, f"Incorrect API key provided: {echo}. " + "x" * 500)
    server = serve(lambda body: bad if body["prompt"] == "bad" else said("fine"))
    engine = make_engine(server)
    row = ask(engine, "good", "bad")[1]
    assert "[key]" in str(row.error)
    assert len(str(row.error)) <= 300
    server.script = lambda body: error(403, f"{echo} may not do this")
    with pytest.raises(UserError, match=r"\[key\] may not do this") as raised:
        ask(engine, "good")
    server.script = lambda body: Reply(200, "x" * 80 + echo)
    with pytest.raises(UserError, match=r"\[key\]") as garbled:
        make_engine(server).check()
    chain: list[BaseException | None] = [raised.value, garbled.value]
    for link in chain:
        if link is not None:
            chain += [link.__cause__, link.__context__]
    shown = [*map(repr, chain), repr(row), repr(engine), repr(vars(engine)["_client"]), str(pickle.dumps(engine))]
    shown += [record.getMessage() for record in caplog.records]
    assert not [text for text in shown if KEY in text or echo in text]


def test_threads_share_one_concurrency_limit(serve: Serve, make_engine: MakeEngine) -> None:
    together = threading.Barrier(3, timeout=20)

    def script(body: Body) -> Reply:
        together.wait()
        return said(body["prompt"])

    server = serve(script)
    engine = make_engine(server, concurrency=3)
    with ThreadPoolExecutor(4) as threads:
        slices = list(threads.map(lambda n: ask(engine, *(f"{n}-{row}" for row in range(9))), range(4)))
    assert [c.text for done in slices for c in done] == [f"{n}-{row}" for n in range(4) for row in range(9)]
    assert server.most_at_once == 3


def test_retries_count_towards_the_rate_limit(serve: Serve, make_engine: MakeEngine) -> None:
    failures = [error(500, "busy", {"retry-after-ms": "1"}) for _ in range(2)]
    server = serve(lambda body: failures.pop() if failures else said("fine"))
    engine = make_engine(server, requests_per_minute=120, retries=2)
    begin = time.monotonic()
    ask(engine, "a", "b")
    assert len(server.asked) == 4
    assert time.monotonic() - begin >= 1  # two at once, two more half a second apart each


def test_an_engine_is_pickled_as_what_it_was_made_of(serve: Serve, make_engine: MakeEngine) -> None:
    engine = make_engine(serve(lambda body: said("|".join(body["stop"]))), stop=("a", "b"))
    with closing(pickle.loads(pickle.dumps(engine))) as copy:
        assert ask(copy, "Q")[0].text == "a|b"


def test_closing_ends_what_is_under_way(serve: Serve, make_engine: MakeEngine) -> None:
    begun, end = threading.Event(), threading.Event()

    def script(body: Body) -> Reply:
        begun.set()
        end.wait(10)
        return said("late")

    engine = make_engine(serve(script))
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(ask, engine, "a")
        begun.wait(10)
        engine.close()
        assert isinstance(waiting.exception(timeout=10), CancelledError)
        end.set()
    engine.close()
