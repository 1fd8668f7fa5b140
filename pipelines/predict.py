"""`distill predict STUDENT FILE…`: files of any size through a student, without Ray and without a teacher.

Every file becomes a folder of Parquet parts with the file's own columns and the student's answer beside them. Parts
are written whole, in order; killed and run again, it goes on after the last.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipelines.artifact import Artifact, fingerprint, make_key, open_path
from pipelines.console import say
from pipelines.errors import UserError
from pipelines.predictor import Predictor
from pipelines.tasks import Task
from pipelines.tasks.sources import read_rows

Row = dict[str, Any]
ANSWER = pa.schema(
    [
        ("predicted_label", pa.string()),  # null: no valid answer, or the row is none of the task
        ("confidence", pa.float32()),
        ("problem", pa.string()),  # why there is no answer, else null
    ]
)
ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
PART_ROWS = 2048
_JOB = "job.json"


def predict_files(student: str, files: Sequence[str], out: str | None = None, batch_size: int = 64) -> list[Row]:
    """Label the rows of files.

    Args:
        student: the directory of a trained student.
        files: CSV, TSV, JSON, JSON lines or Parquet with the columns that the task's `input` names.
        out: where the folders go; by default `<file>.predictions` beside each file.

    Returns:
        One a file: `file`, `predictions` (the folder), `rows`, `labels` (how often each), `problems` (how many).

    Raises:
        UserError: a file or the student is not there, or the folder holds the predictions of others.
    """
    predictor = Predictor.open(student)
    same = make_key("predict", fingerprint(student))
    return [_predict_file(predictor, same, file, out, batch_size) for file in files]


def _predict_file(predictor: Predictor, student_key: str, file: str, out: str | None, batch_size: int) -> Row:
    fs, path = open_path(file)
    if not fs.isfile(path):
        raise UserError(f"{file}: no such file")
    folder = f"{file}.predictions" if out is None else f"{out.rstrip('/')}/{PurePosixPath(path).name}.predictions"
    key = make_key(student_key, fingerprint(file))
    made = Artifact(folder, "predict", key)
    if made.fs.exists(made.path(_JOB)) and json.loads(made.fs.cat_file(made.path(_JOB)))["key"] != key:
        raise UserError(f"{folder}: predictions of another student or of another {file}; remove it, or give --out")
    if not made.done():
        with made.lease():
            made.write_text(_JOB, json.dumps({"key": key, "file": file}) + "\n")
            start, before = time.time(), len(made.parts("rows"))
            if before:
                say(f"  {file}: goes on after {before * PART_ROWS:,} rows")
            rows = islice(read_rows(file), before * PART_ROWS, None)
            for number, part in enumerate(_parts(rows), before):
                made.write_part(f"rows/{number:06d}", _answer(predictor, part, batch_size))
            made.finish({}, [], start, **_count(made))
    manifest = made.manifest()
    say(f"  {file}: {manifest['rows']:,} rows, {manifest['problems']:,} without an answer: {made.file_uri('rows')}")
    return {"file": file, "predictions": made.file_uri("rows"), **_count_keys(manifest)}


def _answer(predictor: Predictor, rows: Sequence[Row], batch_size: int) -> pa.Table:
    """The rows with their answers."""
    task = predictor.task
    read = [_render(task, row) for row in rows]
    fit = [(text, choices) for text, choices, problem in read if problem is None]
    made = iter(predictor.predict([text for text, _ in fit], [choices for _, choices in fit], batch_size))
    answers: list[Row] = []
    for _, _, problem in read:
        if problem is not None:
            answers.append({"problem": problem})
            continue
        said = next(made)
        unreadable = None if said.label is not None else f"the answer reads {said.text[:60]!r}"
        answers.append({"predicted_label": said.label, "confidence": said.confidence, "problem": unreadable})
    table = pa.Table.from_pylist(list(rows))
    clash = [name for name in ANSWER.names if name in table.column_names]
    table = table.drop_columns(clash)
    for name, column in zip(ANSWER.names, pa.Table.from_pylist(answers, ANSWER).columns, strict=True):
        table = table.append_column(name, column)
    return table


def _render(task: Task, row: Row) -> tuple[str, list[str] | None, str | None]:
    """The input that a row makes, its choices, and what is wrong with it."""
    lacking = [name for name in task.fields if row.get(name) is None]
    if lacking:
        return "", None, f"no {lacking[0]!r}, which the input asks for"
    try:
        text, choices = task.render(row), task.row_choices(row)
    except ValueError as error:
        return "", None, str(error)
    return text, choices, None if text else "the input is empty"


def _parts(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while part := list(islice(rows, PART_ROWS)):
        yield part


def _count(made: Artifact) -> Row:
    """Rows, those without an answer, and the commonest labels."""
    labels: Counter[str] = Counter()
    rows = problems = 0
    for part in made.scan("rows", ANSWER, ["predicted_label", "problem"]):
        said = part.column("predicted_label").drop_null().to_pylist()
        labels.update(said)
        rows += part.num_rows
        problems += part.num_rows - part.column("problem").null_count
    return {"rows": rows, "problems": problems, "labels": dict(labels.most_common(50))}


def _count_keys(manifest: Row) -> Row:
    return {name: manifest[name] for name in ("rows", "problems", "labels")}
