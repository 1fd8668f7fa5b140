"""More load than capacity, for a while: `distill serve` as anyone starts it, over HTTP on loopback.

Ten seconds; a minute with STEPDISTILL_SOAK=1.
"""

import asyncio
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import aiohttp
import psutil
import pytest

from cluster.local import free_port
from serve.settings import Limits
from tests.serve.server import distill_serve, replicas, wait_until_ready

pytestmark = pytest.mark.ray

SECONDS = 60 if os.environ.get("STEPDISTILL_SOAK") else 10
HELD = Limits().requests  # at most
CLIENTS = HELD * 3 // 2  # on the same cores as the server: many more would be the load that is measured
BODY = {"inputs": ["The lamp stopped working, and I would like to have another."]}


@dataclass
class Outcome:
    """What came of the requests of one load; times in seconds."""

    statuses: Counter[int] = field(default_factory=Counter)
    accepted: list[float] = field(default_factory=list)
    without_retry_after: int = 0
    memory: list[int] = field(default_factory=list)  # of the replica, in bytes, at equal intervals

    def p99(self) -> float:
        return statistics.quantiles(self.accepted, n=100)[-1]


@pytest.fixture(scope="module", params=[[], ["--proxy"]], ids=["direct", "proxied"])
def server(make_bundle: Callable[..., str], request: pytest.FixtureRequest) -> Iterator[tuple[str, psutil.Process]]:
    """Its address and its one replica."""
    port = free_port()
    arguments = [make_bundle("returns", "1"), "--port", str(port), *request.param]
    process = distill_serve(*arguments, output=subprocess.DEVNULL)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}")
        (replica,) = replicas(process.pid)
        yield f"http://127.0.0.1:{port}", replica
    finally:
        process.terminate()
        process.wait(120)


async def overload(url: str, replica: psutil.Process, clients: int, seconds: float) -> Outcome:
    """So many clients, each with one request after another; who is refused waits as long as told."""
    outcome, end = Outcome(), time.monotonic() + seconds
    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:

        async def client() -> None:
            while time.monotonic() < end:
                start = time.monotonic()
                async with session.post(f"{url}/v1/predict", json=BODY) as response:
                    await response.read()
                outcome.statuses[response.status] += 1
                if response.status == 200:
                    outcome.accepted.append(time.monotonic() - start)
                    continue
                outcome.without_retry_after += "Retry-After" not in response.headers
                await asyncio.sleep(float(response.headers.get("Retry-After", 1)))

        async def watch() -> None:
            while time.monotonic() < end:
                outcome.memory.append(replica.memory_info().rss)
                await asyncio.sleep(seconds / 30)

        await asyncio.gather(watch(), *(client() for _ in range(clients)))
    return outcome


@pytest.mark.long  # where others take the cores, some that were accepted wait beyond the time of a request (408)
def test_the_excess_is_refused_the_rest_answered_in_bounded_time_and_it_recovers(
    server: tuple[str, psutil.Process],
) -> None:
    url, replica = server
    asyncio.run(overload(url, replica, 4, 2))
    calm = asyncio.run(overload(url, replica, 4, 3))
    assert set(calm.statuses) == {200}
    outcome = asyncio.run(overload(url, replica, CLIENTS, SECONDS))
    assert set(outcome.statuses) <= {200, 429, 503}, outcome.statuses
    assert outcome.statuses[200] > 0
    assert outcome.statuses[200] < outcome.statuses.total(), "it was no overload"
    assert outcome.without_retry_after == 0
    a_second = outcome.statuses[200] / max(SECONDS, max(outcome.accepted))
    assert outcome.p99() * a_second < 3 * HELD, "requests waited behind much more than the queue holds"
    third = len(outcome.memory) // 3
    middle, last = (statistics.median(outcome.memory[at * third : (at + 1) * third]) for at in (1, 2))
    assert last < 1.1 * middle, outcome.memory
    again = asyncio.run(overload(url, replica, 4, 3))
    assert set(again.statuses) == {200}
    assert replica.is_running()
    print(f"\ncalm {calm.statuses}, p99 {calm.p99():.2f} s; overload {outcome.statuses}, p99 {outcome.p99():.2f} s")
    print(f"memory {outcome.memory[0] >> 20} to {outcome.memory[-1] >> 20} MiB; after it {again.statuses}")
