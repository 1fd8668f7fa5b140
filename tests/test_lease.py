"""One run at a time on an artefact, and none that waits for the dead."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from pipelines.errors import UserError
from pipelines.lease import hold


def take(path: Path) -> str:
    """What stands in the lease while it is held."""
    with hold(fsspec.filesystem("file"), str(path), "rationales"):
        text = path.read_text()
    assert not path.exists()
    return text


def test_who_holds_it_is_named_and_no_other_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with hold(fsspec.filesystem("file"), str(path), "rationales"):
        with pytest.raises(UserError, match=rf"rationales: another run is at work on it \(process {os.getpid()} on "):
            take(path)
        assert path.exists()


def test_a_process_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    script = (
        "import fsspec, os, sys; from pipelines.lease import hold\n"
        "with hold(fsspec.filesystem('file'), sys.argv[1], ''): os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 1
    assert path.exists()
    assert take(path).endswith(f" {os.getpid()}")


def test_another_machine_that_renews_its_lease_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    path.write_text("elsewhere 1")
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.2):
            path.write_text("elsewhere 1")

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(UserError, match="process 1 on elsewhere"):
        take(path)
    ended.set()
    thread.join()


def test_another_machine_that_renews_nothing_for_a_minute_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lease"
    path.write_text("elsewhere 1")
    almost = time.time() - 58.5
    os.utime(path, (almost, almost))
    assert take(path).endswith(f" {os.getpid()}")
    assert "held by process 1 on elsewhere; waiting to see" in capsys.readouterr().out
