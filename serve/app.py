"""The Ray Serve application: `serve run serve.app:build bundles='[…]'`, `serve deploy serve/config.yaml`, or
`distill serve BUNDLE…` on one machine.

One deployment holds the HTTP side and all bundles, so that a request makes one hop, from the proxy to a replica.
Requests wait within a replica (`served.py`), in their order, and those beyond its limit are refused there: Serve's own
queue, at its proxies, asks a full replica again after growing pauses, which leaves it idle and some to wait for long.
"""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from pipelines.errors import UserError
from pipelines.predictor import Prediction
from serve.api import RETRY_AFTER_S, Student, make_api
from serve.escalate import Teacher
from serve.keys import Keys
from serve.meter import Meter
from serve.served import Served
from serve.settings import Settings, Traffic

_REFUSED = 1000  # requests at once that get as far as a replica to be refused there; beyond them, Serve refuses


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
            served = Served.open(folder, settings, self._meter, worker)
            if served.version in self._models.setdefault(served.name, {}):
                raise UserError(f"{folder}: {served.name}@{served.version} is given twice")
            self._models[served.name][served.version] = served
        self._default = settings.default or next(iter(self._models))
        if self._default not in self._models:
            raise UserError(f"default {self._default!r} is none of {', '.join(self._models)}")

    def __serve_build_asgi_app__(self) -> FastAPI:  # what serve.ingress() asks for
        return make_api(self, self._settings.limits, self._keys, self._meter, self._settings.access_log)

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
        room = len(self._shadows) < self._settings.limits.requests  # a slow shadow misses some rather than fall behind
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
        target_ongoing_requests=args.scaling.ongoing,
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
        max_ongoing_requests=args.limits.requests + _REFUSED,
        max_queued_requests=args.limits.requests,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_timeout_s=args.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100,  # a new version is up before the old one goes
        max_constructor_retry_count=2,
        user_config=args.traffic.model_dump(),
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),  # the application has its own
    )
    return deployment.bind(args)
