"""The processes of a Ray that a test kills."""

from contextlib import suppress

import psutil


def is_agent(process: psutil.Process) -> bool:
    """Whether it is one of Ray's agents, which may outlive their killed raylet by more than half a minute."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
    return False
