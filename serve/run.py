"""`distill serve`: the application on this machine, until it is told to stop."""

import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pydantic import ValidationError

from pipelines.bundle import Bundle, read_bundle
from pipelines.console import say
from pipelines.errors import UserError, explain_invalid
from pipelines.ray_session import ray_session
from serve.keys import Keys
from serve.settings import Settings

_TIMEOUT_S = 30.0  # of a request
_ONE_LOOP = "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"  # the model has a thread of its own, so the loop is free
_DIRECT = {
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # no load balancer must learn first that it goes
    "RAY_SERVE_PORT_QUARANTINE_S": "0",  # nor that it is back: a replica that died is replaced at the same port
}


def settings_for(
    bundles: list[str],
    host: str,
    keyless: bool = False,
    default: str | None = None,
    keys_file: str | None = None,
    replicas: int = 1,
    cpus: float = 1.0,
    access_log: bool = True,
) -> Settings:
    """Settings of one machine: a key is asked for wherever others can reach the port, and where there are keys.

    Raises:
        UserError: a setting is wrong.
    """
    try:
        return Settings(
            bundles=tuple(bundles),
            default=default,
            require_key=not keyless and (keys_file is not None or not _loopback(host)),
            keys_file=keys_file,
            replicas=(replicas, replicas),
            cpus=cpus,
            access_log=access_log,
        )
    except ValidationError as error:
        raise UserError(explain_invalid("serve", Settings, error)) from error


def serve_here(settings: Settings, host: str, port: int, proxy: bool = False) -> None:
    """Serve until SIGINT or SIGTERM, then answer what is under way and stop. One replica listens itself, unless a
    `proxy` is wanted; several have one before them.

    Raises:
        UserError: a bundle is no bundle, a key is lacking, or the port is taken.
    """
    served = [_checked(folder) for folder in settings.bundles]
    if settings.default not in (None, *(bundle.name for bundle in served)):
        raise UserError(f"--default {settings.default}: none of {', '.join(bundle.name for bundle in served)}")
    Keys.wanted(settings.keys_file, settings.require_key)
    with hold(host, port, direct=not proxy and settings.replicas == (1, 1)) as run:
        from serve.app import build  # it imports Ray, and the session sets what that reads

        run(build(settings))
        for bundle in served:
            say(f"serves {bundle.name}@{bundle.version}")
        key = "with an API key" if settings.require_key else "without a key"
        say(f"http://{host}:{port}/ to try it, /docs for its interface, {key}; Ctrl-C ends it")


@contextmanager
def hold(host: str, port: int, direct: bool) -> Iterator[Callable[[Any], None]]:
    """Ray Serve on this machine for one application. At the end of the block it waits until it is told to stop, then
    drains and stops everything.

    With `direct` the one replica itself listens at the port and nothing stands before it; otherwise Serve's proxy
    does, which can have several replicas behind it, holds requests while one is replaced, and takes some milliseconds
    of a core for each.

    Raises:
        UserError: the port is taken.
    """
    _check_free(host, port)
    os.environ.setdefault(_ONE_LOOP, "0")
    if direct:
        os.environ.update(_DIRECT, RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT=str(port))
        os.environ["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(port + 1)  # the first that is not taken
    with ray_session():
        from ray import serve

        stopped = _told_to_stop()  # from here on: who is told while it starts, drains what the first clients asked
        serve.start(
            http_options={"host": host, "port": _any_port() if direct else port, "request_timeout_s": _TIMEOUT_S}
        )
        try:
            yield serve.run
            while not stopped.wait(1):
                pass
            for name in serve.status().applications:
                serve.delete(name)  # drains it while the proxies stand; shutdown() alone would end both at once
        finally:
            serve.shutdown()


def _checked(folder: str) -> Bundle:
    """What a folder holds, before Ray is started."""
    bundle = read_bundle(folder).bundle
    if bundle is None:
        raise UserError(f"{folder}: a student without a version; make a bundle of it with `distill export`")
    return bundle


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(f"port {port} of {host} can't be had: {error.strerror}; take another with --port") from error


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _told_to_stop() -> threading.Event:
    """Set at the first SIGINT or SIGTERM; the second ends the process at once."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopped
