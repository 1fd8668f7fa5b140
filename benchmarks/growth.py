"""What grows with rows and nodes: rows of a student, files, Ray Data's tasks, nodes.

- rows: reading the rows of a student, as each worker of its training does and holds them;
- files: finding out which texts are on disk (listing, reading keys, anti-join), by the number of part files;
- tasks: Ray Data's driver with as many tasks as a pass over the teacher may have;
- nodes: Ray's own nodes as processes of this machine, each with one logical CPU: what starting an actor on every one of
  them and a thousand tasks over all of them take.

Each size runs in a process of its own, whose peak memory the system tells.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

import pyarrow as pa
import typer
from rich.console import Console
from rich.table import Table

from cluster.local import Node, cluster_folder
from pipelines.artifact import Artifact
from pipelines.draw import count_rows, draw_rows
from pipelines.lineage import ROWS
from pipelines.pending import among, keys_on_disk, make_keys
from pipelines.recipe import Run
from pipelines.schema import DATASET, GENERATIONS

Row = dict[str, Any]
_ROWS_OF_A_PART = 64
_TEXT = "The customer was charged twice, which is about a payment. So the answer is billing." * 4


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes; ends within two minutes.")] = False,
    one: Annotated[str, typer.Option(hidden=True)] = "",
    size: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Time and memory by the number of files, tasks and nodes."""
    if one:
        print(json.dumps(CURVES[one][0](size)))
        return
    result: Row = {"benchmark": "growth"}
    for name, (_, sizes) in CURVES.items():
        rows = [_measure(name, size) for size in (sizes[:1] if quick else sizes)]
        _show(name, rows)
        result[name] = rows
    print(json.dumps(result))


def _measure(name: str, size: int) -> Row:
    command = [sys.executable, __file__, "--one", name, "--size", str(size)]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: Row = json.loads(made.stdout.splitlines()[-1])
    return {name: size, **measured}


def _rows(count: int) -> Row:
    """Rows with 60 words of input and 40 of rationale on average."""
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 10))) for _ in range(20_000)]
    with tempfile.TemporaryDirectory() as folder:
        artifact = Artifact(folder, "dataset", "measured")
        with artifact.writer("train", DATASET) as writer:
            for number in range(count):
                said = {"teacher": "t", "sample": 0, "label": "billing", "agreement": 1.0, "rationalized": False}
                said |= {"rationale": " ".join(dice.choices(words, k=40))}
                row = {"row_id": f"{number:016x}", "split": "train", "position": number, "label": "billing"}
                writer.add({**row, "input": " ".join(dice.choices(words, k=60)), "rationales": [said]})
        run = Run(arm="step_by_step")
        start = time.perf_counter()
        counted, _ = count_rows(artifact.iter_rows("train"), run)
        middle, before = time.perf_counter(), _peak_mib()
        drawn = draw_rows(artifact.iter_rows("train"), run)
        end = time.perf_counter()
        assert len(drawn) == counted == count
        return {
            "files": len(artifact.parts("train")),
            "counting, µs a row": round(1e6 * (middle - start) / count, 1),
            "drawing, µs a row": round(1e6 * (end - middle) / count, 1),
            "held, bytes a row": round((_peak_mib() - before) * 2**20 / count),
        }


def _files(count: int) -> Row:
    """Parts of 64 texts on a local disk, half of what is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = Artifact(folder, "generations", "measured")
        for number in range(count):
            rows = [
                dict.fromkeys(GENERATIONS.names)
                | {"row_id": f"{number:012x}{row:012x}", "sample": 0, "text": _TEXT, "finish_reason": "stop"}
                for row in range(_ROWS_OF_A_PART)
            ]
            artifact.write_part(f"{ROWS}/{number:08x}", pa.Table.from_pylist(rows, GENERATIONS))
        before = _peak_mib()
        start = time.perf_counter()
        found = len(artifact.parts(ROWS))
        listed = time.perf_counter()
        done = keys_on_disk(artifact)
        read = time.perf_counter()
        asked = make_keys([(f"{n:012x}{row:012x}", 0) for n in range(count, count + 1000) for row in range(64)])
        wanted = int((~among(asked, done)).sum())
        joined = time.perf_counter()
        assert (found, len(done), wanted) == (count, count * _ROWS_OF_A_PART, len(asked))
        return {
            "texts": len(done),
            "listing, s": round(listed - start, 2),
            "keys, s": round(read - listed, 2),
            "µs a file": round(1e6 * (read - start) / count),
            "64,000 joined, s": round(joined - read, 2),
            "keys, MiB": round(done.nbytes / 2**20, 1),
            "peak MiB more": round(_peak_mib() - before),
        }


def _tasks(count: int) -> Row:
    """A pass that does nothing, with two replicas."""
    from pipelines.ray_session import ray_session

    with ray_session():
        import ray.data

        before, start = _peak_mib(), time.perf_counter()
        items = [{"batches": [{"part": "p" * 80, "rows": bytes(256), "samples": bytes(256)}]} for _ in range(count)]
        dataset = ray.data.from_items(items, override_num_blocks=count)
        made = time.perf_counter()
        pool = ray.data.ActorPoolStrategy(size=2, max_concurrent_calls_per_actor=4, enable_true_multi_threading=True)
        answered = dataset.map_batches(_Idle, batch_format="pyarrow", batch_size=None, compute=pool, num_cpus=1)
        assert sum(1 for _ in answered.iter_rows()) == count
        end = time.perf_counter()
        return {
            "blocks made, s": round(made - start, 1),
            "tasks a second": round(count / (end - made)),
            "driver, peak MiB more": round(_peak_mib() - before),
            "KiB a task": round(1024 * (_peak_mib() - before) / count, 1),
        }


class _Idle:
    def __call__(self, table: pa.Table) -> Row:
        return {"rows": [len(table)]}


def _nodes(count: int) -> Row:
    """A head without CPUs, and so many nodes of one."""
    import ray

    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
    with cluster_folder() as folder, ExitStack() as nodes:
        head = nodes.enter_context(Node(folder)).wait()
        start = time.perf_counter()
        workers: list[Node] = []
        for _ in range(count):
            node = Node(folder, head.address, num_cpus=1, object_store_memory=80 * 2**20)
            workers.append(nodes.enter_context(node).wait())  # at once they would take each other's sockets
        joined = time.perf_counter()
        ray.init(address=head.address, log_to_driver=False, logging_level="ERROR")
        nodes.callback(ray.shutdown)
        actors = [ray.remote(num_cpus=1)(_Here).remote() for _ in range(count)]
        places = ray.get([actor.place.remote() for actor in actors], timeout=500)
        placed = time.perf_counter()
        assert len(set(places)) == count
        for actor in actors:
            ray.kill(actor)
        nothing = ray.remote(num_cpus=1)(_nothing)
        ray.get([nothing.remote() for _ in range(count)])  # workers are there
        started = time.perf_counter()
        ray.get([nothing.remote() for _ in range(1000)])
        ended = time.perf_counter()
        gcs = next(p for p in head.process.children(recursive=True) if p.name() == "gcs_server")
        node_mib = sum(p.memory_info().rss for p in workers[0].process.children(recursive=True)) / 2**20
        return {
            "joining, s": round(joined - start, 1),
            "an actor on each, s": round(placed - joined, 1),
            "1,000 tasks, s": round(ended - started, 2),
            "GCS, MiB": round(gcs.memory_info().rss / 2**20),
            "GCS, s of CPU": round(sum(gcs.cpu_times()[:2]), 1),
            "a node, MiB": round(node_mib),
        }


def _nothing() -> None:
    pass


class _Here:
    def place(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())


CURVES: dict[str, tuple[Callable[[int], Row], Sequence[int]]] = {
    "rows": (_rows, (20_000, 100_000, 400_000)),
    "files": (_files, (1_000, 10_000, 100_000)),
    "tasks": (_tasks, (1_000, 4_000, 16_000)),
    "nodes": (_nodes, (4, 8, 16, 32)),
}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _show(name: str, rows: Sequence[Row]) -> None:
    table = Table(title=name, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:,}" for value in row.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
