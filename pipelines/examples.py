"""STAGE 0, part of `distill rationales`: source files → examples.

Reads the recipe's files and writes `<split>/*.parquet` (see `schema.EXAMPLES`). Every row becomes the
text that teacher and student read, under a row_id made of that text. An input that stands twice is kept
once and counted; test and validation keep theirs before train, so nothing is tested that was trained on.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterator

from pipelines.artifact import Artifact
from pipelines.console import say
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.recipe import Split
from pipelines.schema import EXAMPLES
from pipelines.tasks import Task
from pipelines.tasks.sources import Row, read_rows

_KEEP_FIRST: tuple[Split, ...] = ("test", "validation", "train", "unlabelled")


def build_examples(line: Lineage, force: bool = False) -> Artifact:
    """Make the examples artefact, or find it done.

    Raises:
        UserError: a file is missing or unreadable, a row lacks a field, a label is outside the set, a
            split is empty.
    """
    artifact = line.examples
    if not artifact.begin(force):
        return artifact
    start = time.time()
    seen: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    files = line.recipe.source.files()
    for split in (s for s in _KEEP_FIRST if s in files):
        count: Counter[str] = Counter(read=0, kept=0, duplicates=0, in_another_split=0, unlabelled=0)
        examples = read_examples(line.task, files[split], split, line.recipe.source.limit)
        with artifact.writer(split, EXAMPLES) as kept:
            for example in _without_repeats(examples, seen, count):
                kept.add(example)
        counts[split] = dict(count)
        say(f"  {split}: {count['kept']:,} rows" + _remarks(split, count))
    artifact.finish(line.snapshot(), [], start, counts=counts)
    return artifact


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


def _without_repeats(examples: Iterator[Row], seen: dict[str, str], count: Counter[str]) -> Iterator[Row]:
    for example in examples:
        count["read"] += 1
        first = seen.get(example["row_id"])
        if first is None:
            seen[example["row_id"]] = example["split"]
            count["kept"] += 1
            count["unlabelled"] += example["label"] is None
            yield example
        else:
            count["duplicates" if first == example["split"] else "in_another_split"] += 1


def _remarks(split: str, count: Counter[str]) -> str:
    said = [
        f"{count['duplicates']:,} repeat an earlier row" if count["duplicates"] else "",
        f"{count['in_another_split']:,} stand in another split and were left out" if count["in_another_split"] else "",
        f"{count['unlabelled']:,} have no label" if count["unlabelled"] and split != "unlabelled" else "",
    ]
    return "".join(f"; {s}" for s in said if s)


def _has(row: Row) -> str:
    return f"the row has {', '.join(map(str, row))}"
