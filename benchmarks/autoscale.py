"""Does a cluster grow with the work and shrink after it? Nodes and replicas over time, as a figure.

Two clusters of `cluster/local.yaml`, one after the other, that start with no worker: a rationale run with one to four
engines; then an endpoint with one to three replicas, under load for a while. Nodes are processes of one machine, so
seconds are those of its cores; what comes and goes, and in which order, is Ray's autoscaler at work.
"""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer
import yaml

from cluster.local import Node, Seen, Watch, autoscaling_cluster, cluster_folder, free_port, run_and_watch
from pipelines.bundle import Bundle
from pipelines.checksums import write_checksums
from pipelines.console import say
from pipelines.predictor import Predictor
from pipelines.recipe import resolve
from pipelines.student import load_student
from pipelines.tasks import load_task

FIGURE = Path(__file__).parents[1] / "cluster" / "autoscale.svg"
_WAIT_S = 240  # for the cluster to follow
_CLIENTS = 24


def main(
    load_s: Annotated[float, typer.Option(help="Seconds of load, once all replicas are there.")] = 20,
    figure: Annotated[Path, typer.Option(help="Where to draw.")] = FIGURE,
) -> None:
    """Nodes and replicas over time: a rationale run, and an endpoint under load."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
    with cluster_folder() as folder, autoscaling_cluster(folder) as head:
        say("A rationale run, teacher.replicas=[1, 4]")
        asked = [f"storage={folder}/runs", "teacher.batch_size=32", "teacher.replicas=[1, 4]"]
        command = [sys.executable, "-m", "pipelines", "rationales", "quickstart"]
        code, teacher = run_and_watch(command + [part for value in asked for part in ("--set", value)], head)
        if code:
            raise typer.Exit(code)
    with cluster_folder() as folder, autoscaling_cluster(folder) as head:
        say("An endpoint, replicas: [1, 3]")
        endpoint = _serve(folder, head, load_s)
    _draw({"distill rationales, replicas [1, 4]": teacher, "endpoint, replicas [1, 3]": endpoint}, figure)
    say(f"{figure}")


def _serve(folder: Path, head: Node, load_s: float) -> list[Seen]:
    """Deploy, ask until all replicas are there and then some, stop, wait until one is left; then take it down."""
    port = free_port()
    scaling = {"ongoing": 4, "look_back_s": 12, "up_s": 4, "down_s": 20}
    args = {"bundles": [_bundle(folder)], "require_key": False, "replicas": [1, 3], "scaling": scaling}
    application = {"name": "students", "route_prefix": "/", "import_path": "serve.app:build", "args": args}
    http = {"host": "127.0.0.1", "port": port}
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump({"http_options": http, "applications": [application]}))
    with Watch(head) as watch:
        _serve_command("deploy", str(config), "--address", head.dashboard)
        _need(watch.wait_until(lambda seen: seen.replicas == 1, _WAIT_S), "no replica")
        with _load(f"http://127.0.0.1:{port}") as answered:
            watch.say(f"{_CLIENTS} clients begin")
            _need(watch.wait_until(lambda seen: seen.replicas == 3, _WAIT_S), "did not grow")
            time.sleep(load_s)
        watch.say(f"the clients end; {answered.count(200):,} of {len(answered):,} requests answered")
        _need(watch.wait_until(lambda seen: seen.replicas == seen.workers == 1, _WAIT_S), "did not shrink")
        watch.say("the endpoint is taken down")
        _serve_command("shutdown", "--yes", "--address", head.dashboard)
        _need(watch.wait_until(lambda seen: not seen.workers, _WAIT_S), "a node stayed")
    return watch.seen


def _bundle(folder: Path) -> str:
    """The quickstart's student base as a bundle: what it answers does not matter here."""
    model, tokenizer = load_student(resolve("builtin:quickstart/student"))
    made = folder / "bundle"
    made.mkdir()
    Predictor(model, tokenizer, load_task("returns_desk"), 256, 8, bundle=Bundle("returns", "1")).save(made)
    write_checksums(made)
    return str(made)


def _serve_command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "ray.serve.scripts", *arguments], check=True, capture_output=True)


def _need(met: bool, what: str) -> None:
    if not met:
        raise SystemExit(f"the cluster {what} in {_WAIT_S} s")


@contextmanager
def _load(url: str) -> Iterator[list[int]]:
    """Clients that ask without a pause; the statuses that they got."""
    statuses: list[int] = []
    ended = threading.Event()

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as session:
            while not ended.is_set():
                made = await session.post("/v1/predict", json={"inputs": ["The lamp stopped working. " * 8] * 16})
                statuses.append(made.status_code)

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(_CLIENTS)))

    thread = threading.Thread(target=lambda: asyncio.run(clients()))
    thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        thread.join()


def _draw(panels: dict[str, Sequence[Seen]], figure: Path) -> None:
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rcParams["svg.fonttype"] = "none"  # text stays text: small, and readable by machines
    drawn = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, (title, seen) in zip(drawn.subplots(1, len(panels)), panels.items(), strict=True):
        seconds = [at.seconds for at in seen]
        axes.step(seconds, [at.workers for at in seen], where="post", label="nodes beside the head")
        axes.step(seconds, [at.replicas for at in seen], where="post", linestyle="--", label="replicas")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("seconds")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    drawn.savefig(figure, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
