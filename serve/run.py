"""`distill serve`: the application on this machine, until it is told to stop."""

import ipaddress
import signal
import threading
from types import FrameType

from pydantic import ValidationError

from pipelines.console import say
from pipelines.errors import UserError, explain_invalid
from pipelines.predictor import Bundle, read_bundle
from pipelines.ray_session import ray_session
from serve.settings import Settings

_REQUEST_TIMEOUT_S = 30.0


def settings_for(
    bundles: list[str],
    host: str,
    keyless: bool = False,
    default: str | None = None,
    keys_file: str | None = None,
    replicas: int = 1,
    cpus: float = 1.0,
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
        )
    except ValidationError as error:
        raise UserError(explain_invalid("serve", Settings, error)) from error


def serve_here(settings: Settings, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM, then answer what is under way and stop.

    Raises:
        UserError: a bundle is no bundle, a key is lacking, or the port is taken.
    """
    served = [_checked(folder) for folder in settings.bundles]
    with ray_session():
        from ray import serve  # the session sets what it reads

        from serve.app import build

        application = build(settings)
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": _REQUEST_TIMEOUT_S})
        try:
            serve.run(application)
            for bundle in served:
                say(f"serves {bundle.name}@{bundle.version}")
            key = "with an API key" if settings.require_key else "without a key"
            say(f"http://{host}:{port}/ to try it, /docs for its interface, {key}; Ctrl-C ends it")
            _until_stopped()
        finally:
            serve.shutdown()


def _checked(folder: str) -> Bundle:
    """What a folder holds, before Ray is started."""
    bundle = read_bundle(folder).bundle
    if bundle is None:
        raise UserError(f"{folder}: a student without a version; make a bundle of it with `distill export`")
    return bundle


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _until_stopped() -> None:
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    while not stopped.wait(1):
        pass
