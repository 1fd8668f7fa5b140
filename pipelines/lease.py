"""One run at a time: a file that names who is at work, and is written anew as long as they are."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec

from pipelines.console import say
from pipelines.errors import UserError

_SECONDS = 60.0  # after which a lease that was not renewed does not count
_LOOK_SECONDS = 0.5


@contextmanager
def hold(fs: fsspec.AbstractFileSystem, path: str, what: str) -> Iterator[None]:
    """Hold a lease. One whose process is gone does not count, nor one that was not renewed for a minute; that of
    another machine is watched until it is renewed or so old.

    Args:
        fs, path: where the lease lies.
        what: is held, for people.

    Raises:
        UserError: another run holds it.
    """
    mine = f"{socket.gethostname()} {os.getpid()}"
    while True:
        try:
            fs.pipe_file(path, mine.encode(), mode="create")
            break
        except (FileExistsError, PermissionError) as error:
            holder = _holder(fs, path, what)
            if holder is not None:
                host, pid = holder.rsplit(" ", 1)
                raise UserError(
                    f"{what}: another run is at work on it (process {pid} on {host}); let it finish, or stop it"
                ) from error
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_SECONDS / 4):
            fs.pipe_file(path, mine.encode())

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        fs.rm_file(path)


def _holder(fs: fsspec.AbstractFileSystem, path: str, what: str) -> str | None:
    """Who holds the lease; one that does not count is taken away."""
    try:
        holder = str(fs.cat_file(path).decode())
        host, _, pid = holder.rpartition(" ")
        if host == socket.gethostname():
            holds = _runs(int(pid)) and time.time() - _renewed(fs, path) < _SECONDS
        else:
            holds = _is_renewed(fs, path, f"{what}: held by process {pid} on {host}")
        if holds:
            return holder
        fs.rm_file(path)
    except FileNotFoundError:
        pass
    return None


def _is_renewed(fs: fsspec.AbstractFileSystem, path: str, held: str) -> bool:
    """Wait until the lease is renewed, or too old: which of the two."""
    before = _renewed(fs, path)
    if time.time() - before < _SECONDS:
        say(f"  {held}; waiting to see whether that still runs")
    while time.time() - before < _SECONDS:
        if _renewed(fs, path) != before:
            return True
        time.sleep(_LOOK_SECONDS)
    return False


def _renewed(fs: fsspec.AbstractFileSystem, path: str) -> float:
    fs.invalidate_cache()
    return float(fs.modified(path).timestamp())


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
