"""Which texts a pass over the teacher still wants: what is asked for, less what is on disk; and the tasks to ask in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifact import Artifact
from pipelines.lineage import ROWS, Lineage
from pipelines.recipe import Teacher
from pipelines.schema import GENERATIONS

Row = dict[str, Any]
Keys = np.ndarray[Any, np.dtype[np.bytes_]]  # sorted b"row_id/sample"
CALLS = 4  # tasks that a replica has under way at once, so that its engine never runs dry
_EQUAL = 2048  # tasks of one batch each, then as many of two each, of four, …
_BATCHES = 32  # of one task at most: a budget is kept, and rejects are looked at, when a task ends


@dataclass(frozen=True)
class Asking:
    """One pass over the teacher: which texts, and where they go.

    Args:
        samples: the numbers of the samples wanted of each row.
        only: the keys wanted; None: all.
        hinted: with the gold label told.
        teacher: as in the recipe, or with what this pass changes of the sampling.
    """

    artifact: Artifact
    teacher: Teacher
    samples: range
    only: Keys | None = None
    hinted: bool = False


def keys_on_disk(artifact: Artifact) -> Keys:
    """The texts that are there, sorted."""
    batches = artifact.scan(ROWS, GENERATIONS, ["row_id", "sample"])
    return np.unique(np.concatenate([np.empty(0, dtype="S1"), *map(keys_of, batches)]))


def make_keys(rows: Sequence[tuple[str, int]]) -> Keys:
    """Keys of (row_id, sample) pairs."""
    return np.unique(np.array([f"{row_id}/{sample}".encode() for row_id, sample in rows], dtype="S"))


def keys_of(table: pa.Table | pa.RecordBatch) -> Keys:
    """The keys of a table with row_id and sample, in its order."""
    pairs = zip(table["row_id"].to_pylist(), table["sample"].to_pylist(), strict=True)
    return np.array([f"{row_id}/{sample}".encode() for row_id, sample in pairs], dtype="S")


def pending(line: Lineage, asking: Asking, done: Keys) -> Iterator[tuple[str, pa.Table]]:
    """The texts that a pass still wants: each part of the examples with a table of row_id, sample, and the row's
    number within the part."""
    count = len(asking.samples)
    for split in line.asked:
        for part in line.examples.parts(split):
            row_ids = pq.read_table(part, columns=["row_id"], filesystem=line.examples.fs)["row_id"]
            numbers = np.repeat(np.arange(len(row_ids), dtype=np.int32), count)
            samples = np.tile(np.array(asking.samples, dtype=np.int32), len(row_ids))
            table = pa.table({"row_id": row_ids.take(numbers), "sample": samples, "row": numbers})
            keys = keys_of(table)
            wanted = ~among(keys, done)
            if asking.only is not None:
                wanted &= among(keys, asking.only)
            yield part, table.filter(pa.array(wanted))


def among(keys: Keys, known: Keys) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which keys stand in a sorted array."""
    if not len(known):
        return np.zeros(len(keys), dtype=bool)
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.asarray(known[at] == keys)


def tasks(line: Lineage, asking: Asking, done: Keys, limit: int) -> Iterator[Row]:
    """What is pending, at most `limit` texts, as tasks: batches that a replica takes up one after the other.

    Ray Data keeps some kilobytes of each task in the driver, and each ends as a file. So there are as many as the
    engines have use for, and of a hundred million texts some tens of thousands: tasks grow with their number.

    Yields:
        `{"batches": [{"part": path, "rows": numbers within it, "samples": …}, …]}`, the numbers as bytes of int32.
    """
    batches = _batches(line, asking, done, limit)
    for number in count():
        taken = list(islice(batches, min(2 ** (number // _EQUAL), _BATCHES)))
        if not taken:
            return
        yield {"batches": taken}


def _batches(line: Lineage, asking: Asking, done: Keys, limit: int) -> Iterator[Row]:
    teacher = asking.teacher
    under_way = teacher.endpoint.concurrency if teacher.endpoint else teacher.batch_size
    size = max(1, under_way // CALLS)
    for part, texts in pending(line, asking, done):
        texts = texts.slice(0, limit)
        limit -= len(texts)
        rows, samples = (texts[name].to_numpy().astype(np.int32) for name in ("row", "sample"))
        for at in range(0, len(texts), size):
            of_batch = slice(at, at + size)
            yield {"part": part, "rows": rows[of_batch].tobytes(), "samples": samples[of_batch].tobytes()}
