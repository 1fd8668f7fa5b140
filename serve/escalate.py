"""Below the threshold, ask the teacher: an OpenAI-style endpoint, bounded in time and rate.

Where the bounds leave no room, or the teacher fails or can't be read, the student's own answer stands.
"""

import asyncio
import os
from collections.abc import Sequence

from aiolimiter import AsyncLimiter
from openai import AsyncOpenAI, OpenAIError

from pipelines.errors import UserError
from pipelines.predictor import Prediction
from pipelines.prompts import chat_messages, completion_prompt, stop_strings
from pipelines.replies import read_reply
from pipelines.tasks import Task
from serve.meter import Meter
from serve.settings import Escalate


class Teacher:
    """The endpoint, as one replica asks it. The key is read from the environment here, and never shown."""

    def __init__(self, settings: Escalate, meter: Meter) -> None:
        key = os.environ.get(settings.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the environment variable {settings.api_key_env} holds characters that no key has")
        self._settings, self._meter = settings, meter
        self._client = AsyncOpenAI(
            base_url=settings.url, api_key=key or "none", max_retries=0, timeout=settings.timeout_s
        )
        a_second = settings.requests_per_minute / 60
        self._limiter = AsyncLimiter(max(a_second, 1), max(1 / a_second, 1))  # bursts of a second, not of a minute

    async def answers(
        self, task: Task, texts: Sequence[str], choices: Sequence[Sequence[str] | None], made: Sequence[Prediction]
    ) -> dict[int, str]:
        """The teacher's labels of inputs that the student abstains on, by their place; of as many as it gives in
        time."""
        places = [place for place, prediction in enumerate(made) if prediction.abstained]
        asked = [self._answer(task, texts[place], choices[place]) for place in places]
        labels = await asyncio.gather(*asked)
        return {place: label for place, label in zip(places, labels, strict=True) if label is not None}

    async def _answer(self, task: Task, text: str, choices: Sequence[str] | None) -> str | None:
        if not self._limiter.has_capacity():
            self._meter.escalated("no room")
            return None
        try:
            async with asyncio.timeout(self._settings.timeout_s), self._limiter:
                said = await self._ask(task, text)
        except (OpenAIError, TimeoutError, ValueError) as error:
            self._meter.escalated(type(error).__name__)
            return None
        label = read_reply(task, said, choices, style=self._settings.prompt).label
        self._meter.escalated("unreadable" if label is None else "answered")
        return label

    async def _ask(self, task: Task, text: str) -> str:
        settings = self._settings
        stop = stop_strings(task, settings.prompt)[:4] or None  # more than four are refused by some servers
        if settings.prompt == "completion":
            made = await self._client.completions.create(
                model=settings.model,
                prompt=completion_prompt(task, text),
                max_tokens=settings.max_tokens,
                temperature=0,
                stop=stop,
            )
            return made.choices[0].text if made.choices else ""
        messages = [{"role": m["role"], "content": m["content"]} for m in chat_messages(task, text)]
        reply = await self._client.chat.completions.create(
            model=settings.model,
            messages=messages,  # type: ignore[arg-type]  # the client has a type for each role
            max_tokens=settings.max_tokens,
            temperature=0,
            stop=stop,
        )
        return (reply.choices[0].message.content or "") if reply.choices else ""
