"""A bundle in a replica: its model and what waits for it.

Requests of one model are answered in batches of so many tokens at most, in a thread of their own, so that the next ones
are read meanwhile. Whenever the model is free it takes what waits; `serve.batch` closes a batch before the model is
free for it, so that under load most are of one request.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self

from pipelines.bundle import Bundle
from pipelines.errors import UserError
from pipelines.predictor import Prediction, Predictor
from serve.meter import Meter
from serve.settings import Settings


class _Part(NamedTuple):
    """Inputs of one request that go through the model together."""

    ids: list[list[int]]
    choices: list[Sequence[str] | None]
    scores: bool
    since: float  # time.perf_counter() of its arrival
    made: "asyncio.Future[list[Prediction]]"

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


class Served:
    """One bundle, with its queue; `predictor` has been opened from it."""

    def __init__(
        self, predictor: Predictor, bundle: Bundle, batch_tokens: int, meter: Meter, worker: ThreadPoolExecutor
    ) -> None:
        self.name, self.version, self.task = bundle.name, bundle.version, predictor.task
        self._predictor, self._meter, self._worker = predictor, meter, worker
        self._budget = max(batch_tokens, predictor.max_input_tokens)
        self._waiting: deque[_Part] = deque()
        self._working: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, folder: str, settings: Settings, meter: Meter, worker: ThreadPoolExecutor) -> Self:
        """Load a bundle, and have it answer once, so that the first request does not wait for that.

        Raises:
            UserError: it is none, or a file of it is not what was exported.
        """
        predictor = Predictor.open(folder, "cuda" if settings.gpus else "cpu")
        if predictor.bundle is None:
            raise UserError(f"{folder}: a student without a version; make a bundle of it with `distill export`")
        own = ["yes", "no"] if predictor.task.answer.kind == "row_choice" else None
        predictor.predict(["warm up"], [own])
        return cls(predictor, predictor.bundle, settings.batch_tokens, meter, worker)

    async def answer(
        self, texts: Sequence[str], choices: Sequence[Sequence[str] | None], scores: bool
    ) -> list[Prediction]:
        """Predictions of rendered inputs, in their order."""
        ids = self._predictor.read(texts)
        parts = self._split(ids, choices, scores)
        self._waiting += parts
        if self._working is None:
            self._working = asyncio.get_running_loop().create_task(self._work())
        try:
            return [prediction for part in parts for prediction in await part.made]
        finally:
            for part in parts:
                part.made.cancel()  # where the request was given up, or one of its parts failed

    def _split(self, ids: list[list[int]], choices: Sequence[Sequence[str] | None], scores: bool) -> list[_Part]:
        """A request as parts that a batch can hold, in its order."""
        since, loop = time.perf_counter(), asyncio.get_running_loop()
        parts = [_Part([], [], scores, since, loop.create_future())]
        room = self._budget
        for row, own in zip(ids, choices, strict=True):
            if len(row) > room and parts[-1].ids:
                parts.append(_Part([], [], scores, since, loop.create_future()))
                room = self._budget
            parts[-1].ids.append(row)
            parts[-1].choices.append(own)
            room -= len(row)
        return parts

    async def _work(self) -> None:
        """Answer what waits, batch by batch, until nothing does."""
        while batch := self._take():
            start = time.perf_counter()
            for part in batch:
                self._meter.queued(self.name, self.version, 1000 * (start - part.since))
            try:
                made = await asyncio.get_running_loop().run_in_executor(self._worker, self._predict, batch)
            except Exception as error:  # theirs to tell; what waits does not depend on it
                for part in batch:
                    if not part.made.done():
                        part.made.set_exception(error)
                continue
            answers = iter(made)
            for part in batch:
                answer = [next(answers) for _ in part.ids]
                if not part.made.done():
                    part.made.set_result(answer)
            rows, tokens = sum(len(part.ids) for part in batch), sum(part.tokens for part in batch)
            self._meter.batch(self.name, self.version, rows, tokens, 1000 * (time.perf_counter() - start))
            self._meter.answers(self.name, self.version, made, self.task.answer.kind == "choice")
        self._working = None

    def _take(self) -> list[_Part]:
        """The first that wait, as many as a batch holds; not those whose request was given up."""
        batch: list[_Part] = []
        room = self._budget
        while self._waiting and (not batch or self._waiting[0].tokens <= room):
            part = self._waiting.popleft()
            if not part.made.done():
                batch.append(part)
                room -= part.tokens
        return batch

    def _predict(self, parts: list[_Part]) -> list[Prediction]:
        ids = [row for part in parts for row in part.ids]
        choices = [own for part in parts for own in part.choices]
        return self._predictor.predict_ids(ids, choices, len(ids), scores=any(part.scores for part in parts))
