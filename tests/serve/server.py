"""`distill serve` as a process of its own, for tests."""

import os
import subprocess
import sys
import time
from contextlib import suppress

import httpx
import psutil


def distill_serve(*arguments: str, output: int = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines", "serve", *arguments]
    return subprocess.Popen(command, stdout=output, stderr=output, text=True, env={**os.environ})


def wait_until_ready(process: "subprocess.Popen[str]", url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{url} is not ready")


def replicas(pid: int) -> list[psutil.Process]:
    """Serve's replicas among the descendants of a process."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended since
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process)
    return found
