"""Texts that the user already has, in place of a teacher that is asked."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from pipelines.console import say
from pipelines.errors import UserError
from pipelines.scratch import RowsById, scratch_database
from pipelines.tasks import Task
from pipelines.tasks.sources import Row, read_rows, read_values


def given_outputs(
    task: Task, split: str, files: Sequence[str], examples: Iterable[Row], rows_read: int, limited: bool = False
) -> Iterator[Row]:
    """The texts of one split, joined to its examples.

    Files are either ours (JSON lines, JSON, CSV or Parquet with `text`, and `row_id` or the columns of the task's
    input; several texts of one row are its samples 0, 1, 2 … in the order of the files), or of the reference
    layout: arrays of bare strings, one for each row of the source, in its order.

    Args:
        files: one or more, in their order.
        examples: `schema.EXAMPLES` of the split, in the order of the source.
        rows_read: rows that the source held, with those that were left out.
        limited: the source was read up to `source.limit`, so there may be more texts than rows.

    Yields:
        `schema.GENERATIONS` rows in the order of the examples; an example without a text has one with an error.

    Raises:
        UserError: texts by order are not as many as rows; a row has no text, or nothing to join by.
    """
    if isinstance(next(read_values(files[0]), {}), dict):
        said = _by_row_id(task, files, examples)
    else:
        said = _by_position(files, examples, rows_read, limited)
    for row_id, texts in said:
        for sample, text in enumerate(texts or [None]):
            yield {
                "row_id": row_id,
                "split": split,
                "sample": sample,
                "teacher": "outputs",
                "prompt_hash": "",
                "text": text or "",
                "finish_reason": "error" if text is None else "outputs",
                "error": "no output was given for this row" if text is None else None,
                "input_tokens": None,
                "cached_tokens": None,
                "output_tokens": None,
            }


def _by_position(
    files: Sequence[str], examples: Iterable[Row], rows_read: int, limited: bool
) -> Iterator[tuple[str, list[str | None]]]:
    """(row_id, its text) by the order of the source: all that the reference layout has to join by."""
    numbers = itertools.count()
    texts = zip(_texts(files), numbers, strict=False)
    for example in examples:
        yield example["row_id"], [next((text for text, number in texts if number == example["position"]), None)]
    deque(texts, maxlen=0)  # to their end
    count = next(numbers)
    if count < rows_read or (count > rows_read and not limited):
        raise UserError(
            f"{files[0]} and its {len(files) - 1} further parts hold {count:,} texts, but the source has "
            f"{rows_read:,} rows; texts without row_id are joined by position, so the counts must be the same"
        )


def _texts(files: Sequence[str]) -> Iterator[str | None]:
    for file in files:
        for number, text in enumerate(read_values(file), 1):
            if not isinstance(text, str | None):
                raise UserError(f"{file}, text {number}: expected a string or null, like the texts before it")
            yield text


def _by_row_id(task: Task, files: Sequence[str], examples: Iterable[Row]) -> Iterator[tuple[str, list[str | None]]]:
    """(row_id, its texts), from rows that bring the id or the columns to compute it."""
    with scratch_database() as database:
        texts = RowsById(database)
        rows = ((file, number, row) for file in files for number, row in enumerate(read_rows(file), 1))
        unknown = texts.extend(_text_row(task, f"{file}, row {number}", row) for file, number, row in rows)
        for example in examples:
            found = texts.find(example["row_id"])
            unknown -= len(found)
            yield example["row_id"], [row["text"] for row in found]
    if unknown:
        say(f"  {files[0]}: {unknown:,} texts belong to no example of this split, or to one that was left out")


def _text_row(task: Task, where: str, row: Row) -> Row:
    if not isinstance(row.get("text"), str):
        raise UserError(f"{where}: no 'text', the string that holds the teacher's answer")
    row_id = row.get("row_id")
    if not row_id:
        if any(row.get(field) is None for field in task.fields):
            raise UserError(f"{where}: neither 'row_id' nor the columns {', '.join(task.fields)}")
        try:
            row_id = task.row_id(task.render(row))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    return {"row_id": str(row_id), "text": row["text"]}
