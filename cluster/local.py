"""Clusters on one machine: nodes that are processes, with which autoscaling and the loss of nodes are tried.

`python -m cluster.local COMMAND…` runs a command on a cluster that starts with no worker (`cluster/local.yaml`), and
tells when how many nodes were there, until the cluster has shrunk again. E.g.

    python -m cluster.local distill rationales quickstart --set 'teacher.replicas=[1, 4]'
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import psutil
import yaml

from pipelines.console import say, show_table

CONFIG = Path(__file__).with_name("local.yaml")
_START_S = 120
_SHRINK_S = 120


class Node:
    """A node of a Ray cluster as `ray start` makes it; a context manager that leaves nothing running.

    Args:
        folder: where the cluster has its sockets and logs; a short path.
        address: the cluster's `host:port`; None starts a head.
        environment: beside this process's own.
        before: what `ray start` is an argument of, e.g. `["unshare", "--mount"]`.
        options: of `ray start`, e.g. `num_cpus=1`.
    """

    def __init__(
        self,
        folder: Path,
        address: str | None = None,
        environment: dict[str, str] | None = None,
        before: Sequence[str] = (),
        **options: object,
    ) -> None:
        port = options.get("port", free_port())
        given: dict[str, object] = {"dashboard_agent_listen_port": free_port(), "min_worker_port": 0}
        given |= {"max_worker_port": 0, "disable_usage_stats": True, "num_cpus": 0}
        if address is None:
            given |= {"head": True, "port": port, "temp_dir": folder, "ray_client_server_port": free_port()}
        else:
            given |= {"address": address}
        self.address = address or f"127.0.0.1:{port}"
        self.log = folder / f"node-{port}.log"
        # bytecode is kept, and `python` and `ninja` are those beside this Python
        inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")}
        inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
        command = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        for name, value in (given | options).items():
            flag = f"--{name.replace('_', '-')}"
            command += [flag] if value is True else [f"{flag}={value}"]
        with self.log.open("wb") as log:
            self.process = psutil.Popen(
                command, env=inherited | (environment or {}), stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self) -> Self:
        """Until it says that it runs.

        Raises:
            RuntimeError: it ends, or takes longer than two minutes.
        """
        deadline = time.time() + _START_S
        while "Ray runtime started" not in (said := self.log.read_text()):
            if self.process.poll() is not None or time.time() > deadline:
                raise RuntimeError(f"the node did not start: {said}")
            time.sleep(0.2)
        return self

    def kill(self) -> None:
        """As when the power fails: every process of it, at once."""
        victims = [self.process, *self.process.children(recursive=True)]
        for victim in victims:
            victim.suspend()  # so that none has time to say goodbye
        for victim in victims:
            victim.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        family = self.process.children(recursive=True) if self.process.is_running() else []
        self.process.terminate()
        _, left = psutil.wait_procs([self.process, *family], timeout=30)
        for process in left:
            process.kill()
        psutil.wait_procs(left)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def cluster_folder() -> Iterator[Path]:
    """A folder for a cluster's sockets and logs, with a path that is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a dying process may still write a log


@contextmanager
def autoscaling_cluster(folder: Path) -> Iterator[str]:
    """The cluster of `local.yaml`; its address."""
    config = yaml.safe_load(CONFIG.read_text())
    port = free_port()
    config["provider"]["gcs_address"] = f"127.0.0.1:{port}"
    written = folder / "autoscaling.yaml"
    written.write_text(yaml.safe_dump(config))
    head_id = config["provider"]["head_node_id"]
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": head_id,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_id,
    }
    with Node(folder, environment=environment, port=port, autoscaling_config=written) as head:
        yield head.wait().address


def run_and_watch(command: list[str], address: str) -> tuple[int, list[tuple[float, int]]]:
    """Run a command on a cluster, and wait until the cluster has no worker again.

    Returns:
        The command's exit code, and (seconds since it began, workers) at each change of their number, the last pair
        at the end of the watch.
    """
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    start = time.time()
    changes: list[tuple[float, int]] = [(0.0, 0)]
    ended = None
    with subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}) as process:
        while True:
            workers = sum(node["Alive"] for node in ray.nodes()) - 1
            now = round(time.time() - start, 1)
            if workers != changes[-1][1]:
                changes.append((now, workers))
                say(f"  {now:6.1f} s: {workers} workers")
            if ended is None and process.poll() is not None:
                ended = now
                say(f"  {now:6.1f} s: the command has ended with exit code {process.returncode}")
            if ended is not None and (not workers or now > ended + _SHRINK_S):
                break
            time.sleep(0.5)
    ray.shutdown()
    return process.returncode, changes


def main() -> int:
    """`python -m cluster.local COMMAND…`: the command's exit code."""
    if not sys.argv[1:]:
        print("usage: python -m cluster.local COMMAND…", file=sys.stderr)
        return 2
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
    with cluster_folder() as folder, autoscaling_cluster(folder) as address:
        code, changes = run_and_watch(sys.argv[1:], address)
    show_table("Nodes over time", ["seconds", "workers"], [[f"{at:.1f}", str(workers)] for at, workers in changes])
    return code


if __name__ == "__main__":
    sys.exit(main())
