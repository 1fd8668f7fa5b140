"""API keys by their hashes, from a file and from the environment."""

import hashlib
from pathlib import Path

import pytest

from pipelines.errors import UserError
from serve.keys import HASHES_ENV, Keys


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_several_keys_are_valid_at_once_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hashes"
    file.write_text(f"# two of them\n{digest('old')}\n\n{digest('new').upper()}  # since May\n")
    monkeypatch.setenv(HASHES_ENV, f"{digest('third')}, ")
    keys = Keys.read(str(file))
    assert len(keys) == 3
    for key in ("old", "new", "third"):
        assert keys.find(key) == digest(key)[:8]
    for key in ("", "Old", digest("old"), "old ", "\udcff\0"):
        assert keys.find(key) is None


def test_a_key_in_the_place_of_its_hash_is_refused_without_being_repeated(tmp_path: Path) -> None:
    file = tmp_path / "hashes"
    file.write_text(f"{digest('a')}\nsecret\n")
    with pytest.raises(UserError, match="line 2") as error:
        Keys.read(str(file))
    assert "secret" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        Keys.read(str(tmp_path / "absent"))
