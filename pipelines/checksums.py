"""SHA-256 of every file of a folder, in the form that `sha256sum --check SHA256SUMS` reads."""

import hashlib
from pathlib import Path

from pipelines.errors import UserError

SUMS = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """List every file beneath a folder in its SHA256SUMS."""
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in _files(folder)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify_checksums(folder: Path) -> None:
    """Check that a folder holds the files of its SHA256SUMS, each as it was, and none besides.

    Raises:
        UserError: it does not; the sentence names the file.
    """
    wanted = {}
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        wanted[name] = digest
    found = _files(folder)
    for name in sorted(wanted.keys() - set(found)):
        raise UserError(f"{folder}: {name!r} of its {SUMS} is missing; copy the bundle again")
    for name in found:
        if name not in wanted:
            raise UserError(f"{folder}: {name!r} is not in its {SUMS}; a bundle holds what was exported and no more")
        if _sha256(folder / name) != wanted[name]:
            raise UserError(f"{folder}: {name!r} is not what was exported, its SHA-256 differs; copy the bundle again")


def _files(folder: Path) -> list[str]:
    """Names relative to the folder, sorted; without the sums themselves."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != SUMS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
