"""A folder is what it was, or the file at fault is named."""

import subprocess
from pathlib import Path

import pytest

from pipelines.checksums import SUMS, verify_checksums, write_checksums
from pipelines.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deeper" / "b ü.bin").write_bytes(bytes(range(256)))
    write_checksums(tmp_path)
    return tmp_path


def test_an_untouched_folder_passes_here_and_with_sha256sum(folder: Path) -> None:
    verify_checksums(folder)
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, check=True, capture_output=True)


def test_a_changed_file_is_named(folder: Path) -> None:
    (folder / "deeper" / "b ü.bin").write_bytes(bytes(range(255)) + b"\0")
    with pytest.raises(UserError, match=r"deeper/b ü\.bin.*differs"):
        verify_checksums(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt.*missing"):
        verify_checksums(folder)


def test_a_file_that_came_later_is_named(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        verify_checksums(folder)


@pytest.mark.parametrize("text", ["", "not sums\n", "\udcff\0  a.txt\n"])
def test_sums_that_are_none_are_refused(folder: Path, text: str) -> None:
    (folder / SUMS).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=str(folder)):
        verify_checksums(folder)
