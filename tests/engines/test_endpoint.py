"""The endpoint engine against vLLM's own OpenAI server, on the quickstart's teacher."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from cluster.local import free_port
from pipelines.engines import Request
from pipelines.engines.endpoint import EndpointEngine
from pipelines.errors import UserError
from pipelines.prompts import answer_structure, completion_prompt, stop_strings
from pipelines.recipe import PACKAGE, Teacher
from pipelines.tasks import load_task

pytestmark = pytest.mark.ray

KEY = "a-key-of-the-test-0123456789"
VARIABLE = "TEST_ENDPOINT_KEY"
MODEL = "returns-desk-teacher"
CONTEXT = 1024
START_LIMIT_S = 480
# the tokenizer has no chat template; this one makes of turns what the completion prompt is
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{{ '\n\n' if not loop.last }}{% endfor %}"


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """At once, with the engine, which is a process of its own."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    port = free_port()
    options = {
        "--model": PACKAGE / "quickstart/teacher",
        "--served-model-name": MODEL,
        "--host": "127.0.0.1",
        "--port": port,
        "--api-key": KEY,
        "--chat-template": folder / "chat.jinja",
        "--dtype": "float32",
        "--max-model-len": CONTEXT,
        "--max-num-seqs": 32,
    }
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += ["--enable-prompt-tokens-details", *(str(part) for option in options.items() for part in option)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    started = Server(f"http://127.0.0.1:{port}/v1", process)
    try:
        _wait_until_well(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
        yield started
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        started.kill()


def _wait_until_well(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)


def teacher_at(url: str, **settings: Any) -> Teacher:
    endpoint = {"url": url, "api_key_env": VARIABLE, "retries": 1, **settings.pop("endpoint", {})}
    return Teacher.model_validate(
        {"engine": "openai", "model": MODEL, "max_tokens": 96, "endpoint": endpoint} | settings
    )


TASK = load_task("returns_desk")
LINES = (PACKAGE / "quickstart/data/train.jsonl").read_text().splitlines()[:24]
ROWS = [json.loads(line) for line in LINES]
PROMPTS = [completion_prompt(TASK, TASK.render(row)) for row in ROWS]
STOP = stop_strings(TASK)


def answer(text: str) -> str:
    return text.rpartition("So the answer is ")[2].strip().rstrip(".")


def right(texts: Sequence[str]) -> int:
    return sum(answer(text) == row["decision"] for text, row in zip(texts, ROWS, strict=True))


def test_the_teacher_answers_and_is_mostly_right(server: Server) -> None:
    with closing(EndpointEngine(teacher_at(server.url), STOP)) as engine:
        engine.check()
        done = engine.generate([Request(prompt) for prompt in PROMPTS])
        again = engine.generate([Request(PROMPTS[0])])[0]
    assert right([c.text for c in done]) >= len(ROWS) // 2
    assert {(c.finish_reason, c.error) for c in done} == {("stop", None)}
    assert all(c.input_tokens and c.output_tokens and 500 < c.input_tokens < 700 for c in done)
    assert again.text == done[0].text
    assert again.cached_tokens  # it has seen this prompt


def test_a_text_that_meets_its_limit_is_cut_by_length(server: Server) -> None:
    with closing(EndpointEngine(teacher_at(server.url, max_tokens=5), STOP)) as engine:
        done = engine.generate([Request(PROMPTS[0])])[0]
    assert (done.finish_reason, done.output_tokens) == ("length", 5)


def test_a_chat_goes_through_the_servers_template(server: Server) -> None:
    head, _, question = PROMPTS[0].rpartition("\n\n")
    messages = ({"role": "system", "content": head}, {"role": "user", "content": question})
    with closing(EndpointEngine(teacher_at(server.url, prompt="chat", chat_template_args={"a": 1}), STOP)) as engine:
        engine.check()
        chat, completion = engine.generate([Request(messages), Request(PROMPTS[0])])
    assert chat.finish_reason == "stop"
    assert answer(chat.text) == answer(completion.text) != ""


def test_seeds_decide_what_is_sampled(server: Server) -> None:
    with closing(EndpointEngine(teacher_at(server.url, temperature=2.0), STOP)) as engine:
        texts = [c.text for c in engine.generate([Request("Message:", seed=seed) for seed in (1, 1, 2, 3, 4)])]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_a_structure_binds_the_text(server: Server) -> None:
    task = TASK.model_copy(update={"answer": TASK.answer.model_copy(update={"labels": ("refuse", "accept")})})
    broken = answer_structure(task).replace("sequence", "no such form")
    with closing(EndpointEngine(teacher_at(server.url), STOP)) as engine:
        bound, bad = engine.generate([Request(PROMPTS[0], structure=answer_structure(task)), Request("", None, broken)])
    assert answer(bound.text) in ("refuse", "accept")
    assert bound.finish_reason == "stop"
    assert bad.finish_reason == "error"


def test_a_prompt_beyond_the_context_spoils_no_other(server: Server) -> None:
    with closing(EndpointEngine(teacher_at(server.url), STOP)) as engine:
        huge, odd, good = engine.generate([Request(PROMPTS[0] * 9), Request("🧾 \x00 漢字"), Request(PROMPTS[0])])
    assert (huge.finish_reason, huge.text) == ("too_long", "")
    assert "maximum context length is 1024" in str(huge.error)
    assert odd.finish_reason in ("stop", "length")
    assert good.finish_reason == "stop"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": "returns-desk-taecher"}, f"not serve the teacher.model 'returns-desk-taecher', but {MODEL}$"),
        ({"endpoint": {"api_key_env": "TEST_ENDPOINT_NO_KEY"}}, "wants a key: set the environment .* TEST_ENDPOINT_NO"),
        ({"endpoint": {"api_key_env": "TEST_ENDPOINT_WRONG_KEY"}}, "refuses the key of .* TEST_ENDPOINT_WRONG_KEY$"),
        ({"max_tokens": CONTEXT - 1}, f"max_tokens {CONTEXT - 1} leaves no room for a prompt"),
        ({"max_tokens": CONTEXT * 2}, "refuses even a prompt of one word .*max_tokens"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    server: Server, settings: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_ENDPOINT_WRONG_KEY", "not-" + KEY)
    with closing(EndpointEngine(teacher_at(server.url, **settings), STOP)) as engine:
        with pytest.raises(UserError, match=sentence) as raised:
            engine.check()
        assert KEY not in str(raised.value)


def test_a_path_without_v1_is_told(server: Server) -> None:
    with (
        closing(EndpointEngine(teacher_at(server.url.removesuffix("/v1")), STOP)) as engine,
        pytest.raises(UserError, match="end in /v1"),
    ):
        engine.check()


def test_a_ray_actor_is_given_no_more_than_teacher_and_stop(server: Server) -> None:
    import ray  # not before the cluster is up: Ray reads the environment when it is imported

    options = {"num_cpus": 0, "max_concurrency": 2, "runtime_env": {"env_vars": {VARIABLE: KEY}}}
    actor = ray.remote(EndpointEngine).options(**options).remote(teacher_at(server.url), STOP)
    slices = [PROMPTS[:12], PROMPTS[12:]]
    done = ray.get([actor.generate.remote([Request(prompt) for prompt in part]) for part in slices])
    assert right([c.text for part in done for c in part]) >= len(ROWS) // 2
    wrong = ray.remote(EndpointEngine).options(**options).remote(teacher_at(server.url, model="other"), STOP)
    with pytest.raises(UserError, match=MODEL):
        ray.get(wrong.generate.remote([Request(PROMPTS[0])]))


def test_a_server_killed_in_mid_run_blames_no_row(server: Server) -> None:
    """The last test: afterwards there is no server."""
    with closing(EndpointEngine(teacher_at(server.url, max_tokens=400, temperature=1.0), ())) as engine:
        engine.check()
        Timer(1, server.kill).start()
        with pytest.raises(UserError, match=r"can't be reached .*run the same command again"):
            engine.generate([Request("Message: hello\nReasoning:")] * 5000)
