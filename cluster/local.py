"""Clusters on one machine: nodes that are processes, with which autoscaling and the loss of nodes are tried.

`python -m cluster.local COMMAND…` runs a command on a cluster that starts with no worker (`cluster/local.yaml`), and
tells when how many nodes and replicas were there, until the cluster has shrunk again. E.g.

    python -m cluster.local distill rationales quickstart --set 'teacher.replicas=[1, 4]'
"""

import errno
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from pipelines.console import say, show_table

CONFIG = Path(__file__).with_name("local.yaml")
_START_S = 120
_PORTS = range(20_000, 32_000)  # below those that systems give connections
_SHRINK_S = 300  # at most: what Ray Data asked for last may count for three minutes after it has ended


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
            given |= {"dashboard_port": free_port()} | options
        else:
            given |= {"address": address} | options
        self.address = address or f"127.0.0.1:{port}"
        self.dashboard = f"http://127.0.0.1:{given.get('dashboard_port')}"  # of a head
        self.log = folder / f"node-{port}.log"
        # bytecode is kept, and `python` and `ninja` are those beside this Python
        inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")}
        inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
        command = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        for name, value in given.items():
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
        if not self.process.is_running():
            return
        left = [self.process, *self.process.children(recursive=True)]
        self.process.terminate()  # which alone does not end all of them
        for end in (psutil.Process.terminate, psutil.Process.kill):
            _, left = psutil.wait_procs(left, timeout=2)
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    end(process)
        psutil.wait_procs(left)


def free_port() -> int:
    """A port that nothing listens on now, and that no connection is given before it is used.

    Raises:
        OSError: there is none.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, f"no port of {_PORTS} is free")


@contextmanager
def cluster_folder() -> Iterator[Path]:
    """A folder for a cluster's sockets and logs, with a path that is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a dying process may still write a log


@contextmanager
def autoscaling_cluster(folder: Path) -> Iterator[Node]:
    """The head of the cluster of `local.yaml`."""
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
        yield head.wait()


@dataclass(frozen=True)
class Seen:
    """What a cluster had, so many seconds after one began to look."""

    seconds: float
    workers: int  # nodes beside the head
    replicas: int  # of the teacher, or of an endpoint's students


class Watch:
    """Looks at a cluster in a thread of its own, and says what changes; a context manager."""

    def __init__(self, head: Node) -> None:
        self.head, self.start = head, time.time()
        self.seen = [Seen(0.0, 0, 0)]  # each change, and the last look
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def wait_until(self, reached: Callable[[Seen], bool], seconds: float) -> bool:
        """Whether the cluster came to that in time."""
        deadline = time.time() + seconds
        while not reached(self.seen[-1]) and time.time() < deadline:
            time.sleep(0.5)
        return reached(self.seen[-1])

    def say(self, text: str) -> None:
        """With the seconds since the beginning."""
        say(f"  {time.time() - self.start:6.1f} s: {text}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        from ray.util.state import list_actors, list_nodes
        from ray.util.state.exception import RayStateApiException

        alive: Any = {"filters": [("state", "=", "ALIVE")], "limit": 1000}
        alive["raise_on_missing_output"] = False  # it counts as missing what the filter left out, such as dead nodes
        while not self._ended.wait(0.5):
            try:
                nodes = list_nodes(self.head.dashboard, **alive)
                actors = list_actors(self.head.dashboard, **alive)
            except RayStateApiException:  # busy; the next look will do
                continue
            workers = sum(not node.is_head_node for node in nodes)
            replicas = sum("Asker" in actor.class_name or "ServeReplica" in actor.class_name for actor in actors)
            now = Seen(round(time.time() - self.start, 1), workers, replicas)
            if (workers, replicas) != (self.seen[-1].workers, self.seen[-1].replicas):
                self.say(f"{workers} workers, {replicas} replicas")
            elif len(self.seen) > 1 and (workers, replicas) == (self.seen[-2].workers, self.seen[-2].replicas):
                self.seen.pop()
            self.seen.append(now)


def run_and_watch(command: list[str], head: Node) -> tuple[int, list[Seen]]:
    """Run a command on a cluster, and wait until the cluster has no worker again.

    Returns:
        The command's exit code, and what was seen.
    """
    with Watch(head) as watch:
        code = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": head.address}, check=False).returncode
        watch.say(f"the command has ended with exit code {code}")
        watch.wait_until(lambda seen: not seen.workers, _SHRINK_S)
    return code, watch.seen


def main() -> int:
    """`python -m cluster.local COMMAND…`: the command's exit code."""
    if not sys.argv[1:]:
        print("usage: python -m cluster.local COMMAND…", file=sys.stderr)
        return 2
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
    with cluster_folder() as folder, autoscaling_cluster(folder) as head:
        code, seen = run_and_watch(sys.argv[1:], head)
    rows = [[f"{at.seconds:.1f}", str(at.workers), str(at.replicas)] for at in seen]
    show_table("Over time", ["seconds", "workers", "replicas"], rows)
    return code


if __name__ == "__main__":
    sys.exit(main())
