"""STAGE 0, part of `distill rationales`: source files → examples.

Reads the recipe's files and writes `<split>/*.parquet` (see `schema.EXAMPLES`). Every row becomes the
text that teacher and student read, under a row_id made of that text. An input that stands twice is kept
once; test and validation keep theirs before train, so nothing is tested that was trained on. The same goes
for inputs that nearly repeat another, as far as `source.near_duplicates` says. Rows that are left out are
counted, and lie in `removed/*.parquet` with the reason.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pyarrow as pa

from pipelines.artifact import Artifact
from pipelines.console import say
from pipelines.duplicates import Inputs
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.recipe import Split
from pipelines.schema import EXAMPLES
from pipelines.scratch import scratch_database
from pipelines.tasks import Task
from pipelines.tasks.sources import Row, read_rows

_KEEP_FIRST: tuple[Split, ...] = ("test", "validation", "train", "unlabelled")
_COUNTED = ("read", "kept", "duplicates", "in_another_split", "near_duplicates", "near_leaks", "unlabelled")
_FEW = 20  # among fewer rows, a half of repeats says nothing

# examples/<key>/removed/: rows of the source that stand in no split
REMOVED = pa.schema(
    [
        *(EXAMPLES.field(name) for name in ("row_id", "split", "position", "input")),
        ("reason", pa.string()),  # duplicates, in_another_split, near_duplicates, near_leaks: the names of the counts
        ("of_row_id", pa.string()),  # the row that it repeats
        ("similarity", pa.float32()),
    ]
)


def build_examples(line: Lineage, force: bool = False) -> Artifact:
    """Make the examples artefact, or find it done.

    Raises:
        UserError: a file is missing or unreadable, a row lacks a field, a label is outside the set, a
            split is empty, or all rows of a split make the same input.
    """
    artifact = line.examples
    if artifact.begin(force):
        with artifact.lease():
            _read(line, artifact)
    return artifact


def _read(line: Lineage, artifact: Artifact) -> None:
    start = time.time()
    source = line.recipe.source
    files = {split: path for split in _KEEP_FIRST if (path := source.files().get(split))}
    counts = {split: Counter(dict.fromkeys(_COUNTED, 0)) for split in files}
    with ExitStack() as open_files:
        writers = {split: open_files.enter_context(artifact.writer(split, EXAMPLES)) for split in files}
        removed = open_files.enter_context(artifact.writer("removed", REMOVED))
        database = open_files.enter_context(scratch_database())
        inputs = Inputs(database, source.near_duplicates, source.near_duplicate_similarity)

        def remove(row: Row, reason: str, of_row_id: str, similarity: float) -> None:
            counts[row["split"]][reason] += 1
            removed.add({**row, "reason": reason, "of_row_id": of_row_id, "similarity": similarity})

        for split, path in files.items():
            first, differs = None, False
            for row in read_examples(line.task, path, split, source.limit):
                counts[split]["read"] += 1
                first = first or row["row_id"]
                differs = differs or row["row_id"] != first
                stands_in = inputs.add(row)
                if stands_in is not None:
                    reason = "duplicates" if stands_in == split else "in_another_split"
                    remove(row, reason, row["row_id"], 1.0)
            if counts[split]["read"] > 1 and not differs:
                raise UserError(
                    f"{path}: all {counts[split]['read']:,} rows make the same input; `input` of task {line.task.name} "
                    "shows nothing of the rows that differs, so put the columns into it that tell them apart"
                )
        for row, repeat in inputs.rows():
            if repeat is not None:
                reason = "near_leaks" if repeat.leak else "near_duplicates"
                remove(row, reason, repeat.of_row_id, repeat.similarity)
                continue
            writers[row["split"]].add(row)
            counts[row["split"]]["kept"] += 1
            counts[row["split"]]["unlabelled"] += row["label"] is None
    for sentence in tell_counts(counts):
        say(f"  {sentence}")
    for split, count in counts.items():
        if count["read"] >= _FEW and count["duplicates"] > count["read"] / 2:
            say(f"  {split}: more than half of the rows repeat another; does `input` show all that tells them apart?")
    if any(count["kept"] < count["read"] for count in counts.values()):
        say(f"  the rows that were left out are in {artifact.file_uri('removed')}")
    artifact.finish(line.snapshot(), [], start, counts={split: dict(count) for split, count in counts.items()})


def read_examples(task: Task, path: str, split: str, limit: int | None = None) -> Iterator[Row]:
    """The rows of one file as examples.

    Raises:
        UserError: a row lacks a field of the task's template or of the label, or its label is outside the
            set; the file has no rows. Files, rows and fields are named.
    """
    empty = True
    for position, row in enumerate(itertools.islice(read_rows(path), limit)):
        empty = False
        where = f"{path}, row {position + 1}"
        lacking = [name for name in task.fields if row.get(name) is None]
        if lacking:
            raise UserError(f"{where}: no {lacking[0]!r}, which the input of task {task.name} asks for; {_has(row)}")
        if split not in ("unlabelled", "train") and task.label not in row:
            raise UserError(f"{where}: no {task.label!r}, the label of task {task.name}; {_has(row)}")
        try:
            choices = task.row_choices(row)
            text = task.render(row)
            label = None if split == "unlabelled" else task.gold(row.get(task.label), choices)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        if not text:
            raise UserError(f"{where}: the input is empty")
        if label is None and split in ("validation", "test"):
            raise UserError(f"{where}: {task.label!r} is empty; every row of {split} needs a gold label")
        yield {
            "row_id": task.row_id(text),
            "split": split,
            "position": position,
            "input": text,
            "choices": choices,
            "label": label,
        }
    if empty:
        raise UserError(f"{path}: no rows; {split} can't be empty")


def tell_counts(counts: Mapping[Split, Mapping[str, int]]) -> list[str]:
    """How many rows each split has, and which of the source's were left out of it, in words.

    Args:
        counts: as they stand in the manifest.
    """
    return [f"{split}: {count['kept']:,} rows" + _remarks(split, count) for split, count in counts.items()]


def _remarks(split: str, count: Mapping[str, int]) -> str:
    said = {
        "duplicates": "repeat an earlier row",
        "in_another_split": "stand in another split and were left out",
        "near_duplicates": "nearly repeat an earlier row and were left out",
        "near_leaks": "nearly repeat a row of validation or test and were left out",
        "unlabelled": "have no label" if split != "unlabelled" else "",
    }
    return "".join(f"; {count[name]:,} {words}" for name, words in said.items() if count[name] and words)


def _has(row: Row) -> str:
    return f"the row has {', '.join(map(str, row))}"
