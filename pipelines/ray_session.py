"""Ray for the length of one command: a cluster that is there, or one of its own, and datasets read within it."""

import logging
import os
import sys
import threading
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipelines.artifact import open_path
from pipelines.console import console
from pipelines.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset

_JOIN_S = 30


@contextmanager
def ray_session(storage: str | None = None) -> Iterator[None]:
    """Connect to the cluster of `RAY_ADDRESS`, or start one on this machine and stop it afterwards.

    A cluster must reach the storage that is given from every node.

    One that we start has token authentication on, unless `RAY_AUTH_MODE` says otherwise. Within another
    session it does nothing. `DISTILL_WORKER_LOGS=1` shows what the workers print.

    Raises:
        UserError: the storage is a folder that some node does not share.
    """
    # DeepSpeed compiles with the ninja that lies beside this Python, activated or not
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers of Ray Train resolve paths as this process does
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose first words Ray Tune prints at any verbosity
    import ray  # heavy, and it reads the environment
    import ray.data

    if ray.is_initialized():
        yield
        return
    show = os.environ.get("DISTILL_WORKER_LOGS") == "1"
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=show, logging_level=logging.WARNING)
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # no one preempts this machine's own node
        slots = max(2, os.cpu_count() or 2)  # a stage and what feeds it need two, on one core too
        ray.init(num_cpus=slots, include_dashboard=False, log_to_driver=show, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = console.is_terminal
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns of bars that are off on purpose
    try:
        if storage is not None:
            _check_shared(storage)
        yield
    finally:
        for thread in threading.enumerate():
            if thread.name.startswith("StreamingExecutor"):  # Ray Data's; see `tables`
                thread.join(_JOIN_S)
        ray.shutdown()


def tables(dataset: "Dataset") -> Generator[pa.Table, None, None]:
    """The blocks of a dataset, as they come, until this iterator is closed.

    The iterators of Ray Data go on in threads of their own when they are closed, and a thread that asks for
    something when Ray is shut down ends the process, whatever its exit code was to be.
    """
    import ray

    for bundle in dataset.iter_internal_ref_bundles():
        for block in bundle.blocks:
            yield ray.get(block.ref)


def _check_shared(storage: str) -> None:
    """A local folder must be the same one on every node: a file that is written here is looked for there."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    fs, folder = open_path(storage)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if not isinstance(fs, LocalFileSystem) or len(nodes) == 1:
        return
    marker = Path(folder) / f".{uuid.uuid4().hex}"
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    look = ray.remote(num_cpus=0, max_retries=0)(os.path.exists)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            str(marker.absolute())
        )
        for node in nodes
    ]
    seen: dict[str, bool] = {}
    try:
        for node, answer in zip(nodes, asked, strict=True):
            with suppress(RayError):  # it is dead, which takes Ray a while to find out
                seen[node["NodeID"]] = ray.get(answer)
    finally:
        marker.unlink()
    blind = [node["NodeManagerAddress"] for node in nodes if not seen.get(node["NodeID"], True)]
    if blind:
        raise UserError(
            f"storage {storage}: {len(blind)} of {len(seen)} nodes do not share this folder ({blind[0]}, for one); "
            "give a URI such as s3://bucket/prefix, or a folder that all share"
        )
