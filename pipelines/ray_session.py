"""Ray for the length of one command: a cluster that is there, or one of this command's own."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.console import console


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to the cluster of `RAY_ADDRESS`, or start one on this machine and stop it afterwards.

    One that we start has token authentication on, unless `RAY_AUTH_MODE` says otherwise. Within another
    session it does nothing. `DISTILL_WORKER_LOGS=1` shows what the workers print.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # DeepSpeed compiles with the ninja that lies beside this Python, activated or not
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers of Ray Train resolve paths as this process does
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
    try:
        yield
    finally:
        ray.shutdown()
