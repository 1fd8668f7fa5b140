"""An OpenAI-style HTTP server that answers for the teacher: a vLLM server, a hosted service, any other.

Whose fault a failure is decides what becomes of it, and one more question tells: when a request has failed for
good, after all its retries, the endpoint is asked a short one. If that is answered (or, by an endpoint that is only
busy, other rows' requests meanwhile), the failure was the row's own, and stays with that row. If not, it is the
endpoint's (down, key withdrawn, model gone, quota used up, engine dead behind a live front), and a UserError ends the
engine before another row is blamed; the same command, run again later, goes on where this one stopped. Two failures
need no question: a prompt beyond the model's context, and a request that the server refuses as such (400, 413, 422)
though it has taken others.
"""

import asyncio
import difflib
import os
import re
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from aiolimiter import AsyncLimiter
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
    OpenAIError,
    Timeout,
)
from pydantic import BaseModel, Field, ValidationError

from pipelines.engines import Completion, Request
from pipelines.errors import UserError
from pipelines.recipe import Teacher

CONNECT_TIMEOUT_S = 10.0
_BEYOND_CONTEXT = re.compile(r"(?i)context.?(length|size|window)|prompt is too long|inputs` tokens \+")
_REFUSED_AS_SUCH = (400, 413, 422)

_T = TypeVar("_T")


class _ChatMessage(BaseModel):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(BaseModel):
    finish_reason: str | None = None
    text: str | None = None  # of a completion
    message: _ChatMessage | None = None  # of a chat


class _TokenDetails(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _TokenDetails | None = None


class _Answer(BaseModel):
    """What is read of an answer, of either kind."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class EndpointEngine:
    """The teacher behind `teacher.endpoint`, as an `Engine`.

    All threads that call `generate` share one concurrency limit and one rate limit, which counts retries too. The
    key is read from the environment variable that the recipe names, where the engine is made; it is neither pickled
    nor ever shown.

    Args:
        teacher: with engine `openai`.
        stop: strings that end a text.

    Raises:
        UserError: the environment variable does not hold a key.
    """

    def __init__(self, teacher: Teacher, stop: Sequence[str]) -> None:
        if teacher.endpoint is None:
            raise ValueError("teacher.endpoint is not given")
        self._teacher, self._stop, self._endpoint = teacher, tuple(stop), teacher.endpoint
        self._key = os.environ.get(self._endpoint.api_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(
                f"the environment variable {self._endpoint.api_key_env} holds characters that no key has, such as a "
                "line break: set it to the key alone"
            )
        self._slots = asyncio.Semaphore(self._endpoint.concurrency)
        self._client = AsyncOpenAI(
            base_url=self._endpoint.url,
            api_key=self._key or "none",  # a local server wants no key, the client does
            max_retries=self._endpoint.retries,
            timeout=Timeout(
                self._endpoint.timeout_s,
                connect=min(CONNECT_TIMEOUT_S, self._endpoint.timeout_s),
                pool=None,  # waiting for one's turn is no failure
            ),
            http_client=DefaultAsyncHttpxClient(event_hooks={"request": self._pace()}),
        )
        self._unsupported: set[str] = set()  # parameters that the server turned out not to take
        self._answers = 0
        self._given_up = ""  # why the endpoint is of no use any more
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()

    def __reduce__(self) -> tuple[type["EndpointEngine"], tuple[Teacher, tuple[str, ...]]]:
        return type(self), (self._teacher, self._stop)

    def check(self) -> None:
        """Ask one short question before a million are asked, with the recipe's own settings; it costs one text.

        Raises:
            UserError: the endpoint can't be reached, wants a key or refuses it, does not serve the model, or does
                not take the request.
        """
        self._run(self._question_endpoint())

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in order. All are under way at once as far as the limits allow: give slices.

        Raises:
            UserError: the endpoint is of no use any more, see above. Every later call says so again.
        """
        return self._run(self._complete_all(requests))

    def close(self) -> None:
        """Cancel what is under way and close the connections."""
        if self._loop.is_closed():
            return
        self._run(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """The result of a coroutine in the engine's own event loop; any thread may call."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def _pace(self) -> list[Any]:
        """What the HTTP client awaits before each request, retries included: the rate limit."""
        if self._endpoint.requests_per_minute is None:
            return []
        a_second = self._endpoint.requests_per_minute / 60
        limiter = AsyncLimiter(max(a_second, 1), max(1 / a_second, 1))  # bursts of a second, not of a minute

        async def wait(_: object) -> None:
            await limiter.acquire()

        return [wait]

    async def _complete_all(self, requests: Sequence[Request]) -> list[Completion]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._complete(request)) for request in requests]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _complete(self, request: Request) -> Completion:
        async with self._slots:
            if self._given_up:
                raise UserError(self._given_up)
            try:
                return await self._ask(request)
            except (OpenAIError, ValueError) as error:
                said = self._said(error)
                refused_as_such = isinstance(error, APIStatusError) and error.status_code in _REFUSED_AS_SUCH
            if not (refused_as_such and self._answers):
                await self._question_endpoint()
            return Completion("", "error", error=said)

    async def _question_endpoint(self) -> None:
        """Find out whether the endpoint is of any use.

        Raises:
            UserError: it does not answer a short question, or was given up before.
        """
        if not self._given_up:
            reason = await self._why_of_no_use()
            self._given_up = self._given_up or reason  # which others may have found meanwhile
        if self._given_up:  # not raised where it is caught: the server's own words, unredacted, would be its context
            raise UserError(self._given_up)

    async def _why_of_no_use(self) -> str:
        """What keeps the endpoint from answering a short question; empty when it answers."""
        hello = "Hello" if self._teacher.prompt == "completion" else ({"role": "user", "content": "Hello"},)
        answers = self._answers
        try:
            completion = await self._ask(Request(hello))
        except (OpenAIError, ValueError) as error:
            only_busy = _may_pass(error) and self._answers > answers
            return "" if only_busy else await self._verdict(error)
        if completion.finish_reason == "too_long":
            return (
                f"teacher.max_tokens {self._teacher.max_tokens} leaves no room for a prompt in the context of the "
                f"model at {self._endpoint.url} ({completion.error}): lower it"
            )
        return ""

    async def _ask(self, request: Request) -> Completion:
        """One request, with the client's retries.

        Raises:
            OpenAIError: it failed for good.
            ValueError: the request can't be written as JSON, or the answer is no completion.
        """
        body = self._body(request)
        resource = self._client.completions if isinstance(request.prompt, str) else self._client.chat.completions
        try:
            answer = await resource.with_raw_response.create(**body)
        except APIStatusError as error:
            if error.status_code in _REFUSED_AS_SUCH and _BEYOND_CONTEXT.search(f"{error.code} {error.body}"):
                return Completion("", "too_long", error=self._said(error))
            if error.code != "unsupported_parameter" or error.param not in self._dispensable() & body.keys():
                raise
            self._unsupported.add(error.param)
        else:
            completion = _read(answer.http_response.text)
            self._answers += 1
            return completion
        return await self._ask(request)

    def _body(self, request: Request) -> dict[str, Any]:
        teacher = self._teacher
        extra: dict[str, Any] = {}
        if request.structure is not None:
            extra["structured_outputs"] = {"structural_tag": request.structure}
        body: dict[str, Any] = {
            "model": teacher.model,
            "max_tokens": teacher.max_tokens,
            "temperature": teacher.temperature,
            "top_p": teacher.top_p,
            "extra_body": extra,
        }
        if isinstance(request.prompt, str):
            body["prompt"] = request.prompt
        else:
            body["messages"] = list(request.prompt)
            if teacher.chat_template_args:
                extra["chat_template_kwargs"] = teacher.chat_template_args
        if self._stop:
            body["stop"] = list(self._stop)
        if request.seed is not None:
            body["seed"] = request.seed
        for name in self._unsupported:
            value = body.pop(name, None)
            if name == "max_tokens":
                extra["max_completion_tokens"] = value
        return body

    def _dispensable(self) -> set[str]:
        """Parameters that OpenAI's reasoning models refuse and that can be done without: max_tokens has another name
        there (which older servers would ignore, and write without end), texts are cut at stop strings when they are
        read, and a top_p of 1 changes nothing."""
        return {"max_tokens", "stop"} | ({"top_p"} if self._teacher.top_p == 1 else set())

    def _said(self, error: Exception) -> str:
        """An error in one short line, without the key."""
        if isinstance(error, APIStatusError):
            body = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
            said = f"{error.status_code}: {body}"
        elif isinstance(error, APIConnectionError) and error.__cause__ is not None:
            said = f"{type(error.__cause__).__name__}: {error.__cause__}"
        else:
            said = str(error)
        said = " ".join(self._redact(said).split())
        return said if len(said) <= 300 else said[:299] + "…"

    def _redact(self, text: str) -> str:
        if not self._key:
            return text
        masked = rf"{re.escape(self._key[:3])}[\w*.…-]*{re.escape(self._key[-3:])}"  # services show both ends
        return re.sub(masked, "[key]", text.replace(self._key, "[key]"))

    async def _verdict(self, error: Exception) -> str:
        """Why the endpoint is of no use, and what to do, in one sentence."""
        url, model, variable = self._endpoint.url, self._teacher.model, self._endpoint.api_key_env
        tries, said = self._endpoint.retries + 1, self._said(error)
        if isinstance(error, APITimeoutError):
            return (
                f"{url} gave no answer in time ({said}; tries: {tries}): is it up? Otherwise raise "
                f"teacher.endpoint.timeout_s ({self._endpoint.timeout_s:g}) or lower teacher.endpoint.concurrency"
            )
        if isinstance(error, APIConnectionError):
            return (
                f"{url} can't be reached ({said}; tries: {tries}): start the server or correct "
                "teacher.endpoint.url, then run the same command again"
            )
        if not isinstance(error, APIStatusError):
            return f"{url} is no OpenAI-style endpoint, {said}: does teacher.endpoint.url end in /v1?"
        match error.status_code:
            case 401 | 403 if not self._key:
                return f"{url} wants a key: set the environment variable {variable} (on all nodes of a cluster)"
            case 401:
                return f"{url} refuses the key of the environment variable {variable}"
            case 403:
                return f"{url} does not allow this to the key of the environment variable {variable} ({said})"
            case 404:
                served = await self._served()
                if served and model not in served:
                    near = ", ".join(difflib.get_close_matches(model, served, n=10, cutoff=0))
                    return f"{url} does not serve the teacher.model {model!r}, but {near}"
                return (
                    f"{url} does not know what was asked ({said}): does teacher.endpoint.url end in /v1, and does the "
                    f"server answer prompts of style {self._teacher.prompt!r} for {model!r}?"
                )
            case 429:
                return (
                    f"{url} takes no more requests ({said}; tries: {tries}): see to the quota, lower "
                    "teacher.endpoint.concurrency or set requests_per_minute, then run the same command again"
                )
            case _ if _may_pass(error):
                return f"{url} answers nothing but errors ({said}; tries: {tries}): run the same command again later"
            case _:
                return f"{url} refuses even a prompt of one word ({said}): correct the recipe's teacher"

    async def _served(self) -> list[str]:
        """The names of the models served there; empty where there is no such list."""
        try:
            answer = await self._client.models.with_raw_response.list()
            return [model.id for model in _Models.model_validate_json(answer.http_response.text).data]
        except (OpenAIError, ValidationError):
            return []


def _may_pass(error: Exception) -> bool:
    """Whether the client has tried again on this error."""
    if isinstance(error, APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, APIConnectionError)


def _read(text: str) -> Completion:
    """The body of an answer, of either kind, as a completion.

    Raises:
        ValueError: it is none.
    """
    try:
        answer = _Answer.model_validate_json(text)
    except ValidationError:
        raise ValueError(f"the answer is no completion: {text!r}") from None
    choice, usage = answer.choices[0], answer.usage or _Usage()
    written = choice.text or ""
    if choice.message is not None:
        thinking = choice.message.reasoning or choice.message.reasoning_content
        written = (f"<think>{thinking}</think>" if thinking else "") + (choice.message.content or "")
    reason = choice.finish_reason
    return Completion(
        text=written,
        finish_reason="stop" if reason == "stop" else "length" if reason == "length" else "error",
        error=None if reason in ("stop", "length") else f"the server ended the text with {reason!r}",
        input_tokens=usage.prompt_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None,
        output_tokens=usage.completion_tokens,
    )
