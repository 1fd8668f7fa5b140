"""The Ray Serve application: `serve run serve.app:build bundles='[…]'`, `serve deploy serve/config.yaml`, or
`distill serve BUNDLE…` on one machine.

One deployment holds the HTTP side and all bundles, so that a request makes one hop, from the proxy to a replica.
Requests wait at the proxy, at most so many; within a replica, those of one model are answered in batches of so many
tokens at most, in a thread of their own, so that the next ones are read meanwhile. Whenever the model is free it takes
what waits. (`serve.batch` closes a batch before the model is free for it, so under load most are of one request.)
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from pipelines.errors import UserError
from pipelines.predictor import Prediction, Predictor
from serve.api import Student, make_api
from serve.escalate import Teacher
from serve.keys import Keys
from serve.meter import Meter
from serve.settings import Settings, Traffic

_RETRY_AFTER_S = 1


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
    """A bundle in a replica, with its queue."""

    def __init__(self, folder: str, settings: Settings, meter: Meter, worker: ThreadPoolExecutor) -> None:
        predictor = Predictor.open(folder, "cuda" if settings.gpus else "cpu")
        if predictor.bundle is None:
            raise UserError(f"{folder}: a student without a version; make a bundle of it with `distill export`")
        self.name, self.version, self.task = predictor.bundle.name, predictor.bundle.version, predictor.task
        self._predictor, self._meter, self._worker = predictor, meter, worker
        self._budget = max(settings.batch_tokens, predictor.max_input_tokens)
        self._waiting: deque[_Part] = deque()
        self._working: asyncio.Task[None] | None = None
        own = ["yes", "no"] if self.task.answer.kind == "row_choice" else None
        predictor.predict(["warm up"], [own])

    async def answer(
        self, texts: Sequence[str], choices: Sequence[Sequence[str] | None], scores: bool
    ) -> list[Prediction]:
        """Predictions of rendered inputs, in their order."""
        ids = self._predictor.read(texts)
        parts = self._split(ids, choices, scores)
        self._waiting += parts
        if self._working is None:
            self._working = asyncio.get_running_loop().create_task(self._work())
        answered = await asyncio.gather(*(part.made for part in parts))
        made = [prediction for answer in answered for prediction in answer]
        self._meter.answers(self.name, self.version, made, self.task.answer.kind == "choice")
        return made

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
                made = iter(await asyncio.get_running_loop().run_in_executor(self._worker, self._predict, batch))
            except Exception as error:  # theirs to tell; what waits does not depend on it
                for part in batch:
                    if not part.made.done():
                        part.made.set_exception(error)
                continue
            for part in batch:
                answer = [next(made) for _ in part.ids]
                if not part.made.done():
                    part.made.set_result(answer)
            rows, tokens = sum(len(part.ids) for part in batch), sum(part.tokens for part in batch)
            self._meter.batch(self.name, self.version, rows, tokens, 1000 * (time.perf_counter() - start))
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


class App:
    """One replica."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(max(1, int(settings.cpus)))
        self._settings, self._meter = settings, Meter()
        self._keys = Keys.wanted(settings.keys_file, settings.require_key)
        self._traffic = settings.traffic
        self._teacher = Teacher(settings.escalate, self._meter) if settings.escalate else None
        self._shadows: set[asyncio.Task[None]] = set()  # the loop itself holds tasks only weakly
        self._dice = random.Random()
        worker = ThreadPoolExecutor(1, "model")  # one: more would share the same cores
        self._models: dict[str, dict[str, Served]] = {}
        for folder in settings.bundles:
            served = Served(folder, settings, self._meter, worker)
            if served.version in self._models.setdefault(served.name, {}):
                raise UserError(f"{folder}: {served.name}@{served.version} is given twice")
            self._models[served.name][served.version] = served
        self._default = settings.default or next(iter(self._models))
        if self._default not in self._models:
            raise UserError(f"default {self._default!r} is none of {', '.join(self._models)}")

    def __serve_build_asgi_app__(self) -> FastAPI:  # what serve.ingress() asks for
        return make_api(self, self._settings.limits, self._keys, self._meter)

    def reconfigure(self, traffic: dict[str, Any]) -> None:
        """Another split of traffic, without a restart."""
        wanted = Traffic.model_validate(traffic)
        for name, version in [
            *((name, version) for name, shares in wanted.shares.items() for version in shares),
            *wanted.shadow.items(),
        ]:
            if version not in self._models.get(name, {}):
                raise UserError(f"traffic: {name}@{version} is not among the bundles")
        self._traffic = wanted

    def pick(self, model: str | None) -> Served:
        name, _, version = (model or self._default).partition("@")
        versions = self._models[name]
        if version:
            return versions[version]
        shares = self._shares(name)
        return versions[self._dice.choices(list(shares), list(shares.values()))[0]]

    async def escalate(
        self, student: Student, texts: list[str], choices: list[list[str] | None], made: list[Prediction]
    ) -> dict[int, str]:
        return await self._teacher.answers(student.task, texts, choices, made) if self._teacher else {}

    def shadow(
        self, student: Student, texts: list[str], choices: list[list[str] | None], made: list[Prediction]
    ) -> None:
        version = self._traffic.shadow.get(student.name)
        room = len(self._shadows) < self._settings.ongoing  # a slow shadow misses some rather than fall behind
        if version is not None and version != student.version and room:
            beside = self._models[student.name][version]
            task = asyncio.get_running_loop().create_task(self._compare(beside, texts, choices, made))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _compare(
        self, beside: Served, texts: list[str], choices: list[list[str] | None], made: list[Prediction]
    ) -> None:
        other = await beside.answer(texts, choices, scores=False)
        for served, shadow in zip(made, other, strict=True):
            self._meter.shadowed(beside.name, beside.version, beside.task.same(served.label, shadow.label))

    def listed(self) -> list[tuple[Student, float]]:
        names = sorted(self._models, key=lambda name: name != self._default)
        return [
            (served, self._shares(name).get(version, 0.0))
            for name in names
            for version, served in self._models[name].items()
        ]

    def _shares(self, name: str) -> dict[str, float]:
        return self._traffic.shares.get(name) or {list(self._models[name])[-1]: 1.0}


def build(args: Settings) -> serve.Application:
    """The application; Serve validates `args`.

    Raises:
        UserError: a key is asked for and none is given.
    """
    Keys.wanted(args.keys_file, args.require_key)
    low, high = args.replicas
    scaling = AutoscalingConfig(
        min_replicas=low,
        max_replicas=high,
        target_ongoing_requests=args.ongoing / 2,
        look_back_period_s=args.scaling.look_back_s,
        upscale_delay_s=args.scaling.up_s,
        downscale_delay_s=args.scaling.down_s,
    )
    deployment = serve.deployment(
        serve.ingress()(App),
        name="students",
        autoscaling_config=scaling if high > low else None,
        num_replicas=None if high > low else low,
        ray_actor_options={
            "num_cpus": args.cpus,
            "num_gpus": args.gpus,
            "label_selector": args.node_labels or None,
        },
        max_ongoing_requests=args.ongoing,
        max_queued_requests=args.queued,
        backpressure_config=BackpressureConfig(retry_after_s=_RETRY_AFTER_S),
        graceful_shutdown_timeout_s=args.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100,  # a new version is up before the old one goes
        max_constructor_retry_count=2,
        user_config=args.traffic.model_dump(),
        logging_config=LoggingConfig(enable_access_log=False),  # the application writes its own
    )
    return deployment.bind(args)
