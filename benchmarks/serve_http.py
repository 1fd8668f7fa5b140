"""The servers that `serve.py` compares, each in a process of its own, and the load on them.

As a script it is one server: `serve_http.py KIND FOLDER PORT THREADS`.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[1])  # in this folder, `serve` would be the benchmark

import aiohttp  # noqa: E402
import torch  # noqa: E402

from benchmarks.serve_models import CLOSED, LABELS  # noqa: E402
from cluster.local import free_port  # noqa: E402
from pipelines.bundle import Bundle  # noqa: E402
from pipelines.predictor import Prediction, Predictor  # noqa: E402

GOALS, PROXIES = ("plain", "direct"), ("proxied", "haproxy")  # those of a group are up together
# the second: user code runs in the loop that reads requests, and logs are written many lines at once
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
Rates = dict[tuple[str, int], list[float]]


class Instant:
    """A predictor that says the same of everything, at once."""

    task, max_input_tokens = CLOSED, 256

    def predict(self, inputs: Sequence[str]) -> list[Prediction]:
        return [Prediction(LABELS[0], 1.0, LABELS[0])] * len(inputs)

    def read(self, inputs: Sequence[str]) -> list[list[int]]:
        return [[0]] * len(inputs)

    def predict_ids(self, ids: list[list[int]], *_: object, **__: object) -> list[Prediction]:
        return [Prediction(LABELS[0], 1.0, LABELS[0])] * len(ids)


def time_servers(
    kinds: Sequence[str],
    folder: Path,
    texts: list[str],
    connections: Sequence[int],
    rounds: int,
    seconds: float,
    threads: int,
) -> Rates:
    """Requests a second, by side and connections. The servers are up together; one at a time is asked."""
    rates: Rates = {}
    with servers(kinds, folder, threads) as urls:
        for turn in range(rounds + 1):
            for many in connections:
                for kind, url in urls.items():
                    rate = asyncio.run(_load(url, texts, many, seconds if turn else 1.0))
                    if turn:
                        rates.setdefault((kind, many), []).append(rate)
    return rates


async def _load(url: str, texts: list[str], connections: int, seconds: float) -> float:
    """Answers a second to so many connections, each of which asks for one input as soon as it has its last answer."""
    bodies = [json.dumps({"inputs": [text]}) for text in texts]
    done, end = 0, time.perf_counter() + seconds
    connector = aiohttp.TCPConnector(limit=connections)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def ask(number: int) -> None:
            nonlocal done
            while time.perf_counter() < end:
                async with session.post(f"{url}/v1/predict", data=bodies[number % len(bodies)]) as response:
                    content = await response.read()
                    if response.status != 200:
                        raise SystemExit(f"{url}: {response.status} {content[:200]!r}")
                    done += time.perf_counter() < end
                number += connections

        await asyncio.gather(*map(ask, range(connections)))
    return done / seconds


@contextmanager
def servers(kinds: Sequence[str], folder: Path, threads: int) -> Iterator[dict[str, str]]:
    """Servers in processes of their own, and their addresses, until they are no longer wanted."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        urls = {}
        for kind in kinds:
            port = free_port()
            command = [sys.executable, __file__, kind, str(folder), str(port), str(threads)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            started[kind] = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            urls[kind] = f"http://127.0.0.1:{port}"
        for kind, url in urls.items():
            asyncio.run(_until_ready(url, started[kind]))
        yield urls
    finally:
        for process in started.values():
            process.terminate()
        for process in started.values():
            process.wait(120)


async def _until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server of {url} ended with {process.returncode}")
            try:
                async with session.get(f"{url}/healthz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)


def _server(kind: str, folder: str, port: int, threads: int) -> None:
    """One server; `kind` is a side, perhaps with ` noop`."""
    side, _, noop = kind.partition(" ")
    if side == "plain":
        _serve_plain(None if noop else folder, port, threads)
        return
    if side == "haproxy":
        os.environ.update(HAPROXY)
    from serve.run import hold, serve_here, settings_for

    if not noop:
        settings = settings_for([folder], "127.0.0.1", cpus=threads, access_log=False)
        serve_here(settings, "127.0.0.1", port, proxy=side != "direct")
        return
    with hold("127.0.0.1", port, direct=side == "direct") as run:
        run(_noop_application())


def _noop_application() -> Any:
    """Our application around a model that answers at once."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from serve.api import Student, make_api
    from serve.meter import Meter
    from serve.served import Served
    from serve.settings import Limits

    class Noop:
        def __serve_build_asgi_app__(self) -> Any:
            meter = Meter()
            instant: Any = Instant()
            self.served = Served(instant, Bundle("bench", "1"), 4096, meter, ThreadPoolExecutor(1))
            return make_api(self, Limits(), None, meter, access_log=False)

        def pick(self, model: str | None) -> Student:
            return self.served

        async def escalate(self, *_: object) -> dict[int, str]:
            return {}

        def shadow(self, *_: object) -> None:
            pass

        def listed(self) -> list[tuple[Student, float]]:
            return [(self.served, 1.0)]

    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    application = serve.ingress()(Noop)
    return serve.deployment(application, max_ongoing_requests=256, logging_config=quiet).bind()


def _serve_plain(folder: str | None, port: int, threads: int) -> None:
    """FastAPI and uvicorn as one would write them by hand: what waits is answered together, in a thread."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    class Body(BaseModel):
        inputs: list[str]

    torch.set_num_threads(threads)
    predictor = Predictor.open(folder) if folder else Instant()
    api, worker = FastAPI(), ThreadPoolExecutor(1)
    waiting: asyncio.Queue[tuple[list[str], asyncio.Future[list[Prediction]]]] = asyncio.Queue()
    running: list[asyncio.Task[None]] = []

    async def batches() -> None:
        while True:
            taken = [await waiting.get()]
            while not waiting.empty() and len(taken) < 32:
                taken.append(waiting.get_nowait())
            texts = [text for inputs, _ in taken for text in inputs]
            made = iter(await asyncio.get_running_loop().run_in_executor(worker, predictor.predict, texts))
            for inputs, future in taken:
                future.set_result([next(made) for _ in inputs])

    @api.post("/v1/predict")
    async def predict(body: Body) -> dict[str, Any]:
        if not running:
            running.append(asyncio.create_task(batches()))
        future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
        waiting.put_nowait((body.inputs, future))
        made = await future
        return {"predictions": [{"label": p.label, "confidence": p.confidence} for p in made]}

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(api, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    _server(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
