"""Files of any size through a student: the same rows, one answer each, nothing lost, nothing done twice."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipelines import predict
from pipelines.errors import UserError
from pipelines.predict import predict_files
from pipelines.predictor import Predictor
from pipelines.recipe import resolve
from pipelines.student import load_student
from pipelines.tasks import load_task

pytestmark = pytest.mark.slow  # it loads transformers

TASK = load_task("returns_desk")
MESSAGES = ["My dog chewed it.", "Übergröße 🧾\x00", "I changed my mind. " * 40, "The lamp stopped working."] * 3


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("student")
    Predictor(*load_student(resolve("builtin:quickstart/student")), TASK).save(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "PART_ROWS", 5)


def messages(path: Path, rows: list[Any] | None = None) -> str:
    """A file of messages with a number each."""
    (column,) = TASK.fields
    rows = [{column: text, "n": n} for n, text in enumerate(MESSAGES)] if rows is None else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(folder: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = pyarrow.dataset.dataset(folder).to_table().to_pylist()
    return made


def test_every_row_comes_back_in_its_order_with_the_students_answer(student: str, tmp_path: Path) -> None:
    (made,) = predict_files(student, [messages(tmp_path / "m.jsonl")])
    rows = read(made["predictions"])
    assert [row["n"] for row in rows] == list(range(12))
    expected = Predictor.open(student).predict([text.strip() for text in MESSAGES])
    assert [row["predicted_label"] for row in rows] == [p.label for p in expected]
    assert [row["confidence"] for row in rows] == pytest.approx([p.confidence for p in expected], rel=1e-3)
    assert made["rows"] == sum(made["labels"].values()) == 12
    assert made["problems"] == 0


def test_a_row_that_is_none_of_the_task_stays_with_the_reason(student: str, tmp_path: Path) -> None:
    (column,) = TASK.fields
    file = messages(tmp_path / "m.jsonl", [{column: "It broke."}, {"other": 1}, {column: " "}, {column: None}])
    (made,) = predict_files(student, [file], out=str(tmp_path / "out"))
    assert made["predictions"].startswith(str(tmp_path / "out" / "m.jsonl.predictions"))
    rows = read(made["predictions"])
    assert [row["predicted_label"] is None for row in rows] == [False, True, True, True]
    lacks = f"no '{column}', which the input asks for"
    assert [row["problem"] for row in rows] == [None, lacks, "the input is empty", lacks]
    assert made["problems"] == 3


def test_killed_as_a_process_it_loses_no_row_and_doubles_none(student: str, tmp_path: Path) -> None:
    (column,) = TASK.fields
    file = messages(tmp_path / "m.jsonl", [{column: f"Order {n} broke.", "n": n} for n in range(400)])
    code = "import sys; from pipelines import predict as p; p.PART_ROWS = 5; p.predict_files(sys.argv[1], sys.argv[2:])"
    process = subprocess.Popen([sys.executable, "-c", code, student, file])
    rows = Path(f"{file}.predictions", "rows")
    while len(list(rows.glob("*.parquet"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in rows.glob("*.parquet")}
    assert 3 <= len(before) < 80
    (made,) = predict_files(student, [file])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [row["n"] for row in read(made["predictions"])] == list(range(400))
    assert made["rows"] == 400


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_any_kind_of_file_is_read(student: str, tmp_path: Path, ending: str) -> None:
    (column,) = TASK.fields
    content = [{column: "It broke, alas.", "n": 1}, {column: 'It "broke".', "n": 2}]
    path = tmp_path / f"m.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif ending == "jsonl":
        messages(path, content)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [column, "n"], delimiter="\t" if ending == "tsv" else ",")
            writer.writeheader()
            writer.writerows(content)
    (made,) = predict_files(student, [str(path)])
    rows = read(made["predictions"])
    assert [(row[column], int(row["n"])) for row in rows] == [("It broke, alas.", 1), ('It "broke".', 2)]
    assert all(row["predicted_label"] in TASK.answer.labels and 0 < row["confidence"] <= 1 for row in rows)


def test_stopped_it_goes_on_after_the_last_part(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = messages(tmp_path / "m.jsonl")
    answer, answered = predict._answer, []

    def until_the_third(*arguments: Any) -> Any:
        answered.append(len(arguments[1]))
        if len(answered) == 3:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(predict, "_answer", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        predict_files(student, [file])
    (made,) = predict_files(student, [file])
    assert answered == [5, 5, 2, 2], "no part is made twice"
    assert [row["n"] for row in read(made["predictions"])] == list(range(12))
    predict_files(student, [file])
    assert len(answered) == 4


def test_predictions_of_another_file_are_not_mixed_with_these(student: str, tmp_path: Path) -> None:
    predict_files(student, [messages(tmp_path / "m.jsonl")])
    (column,) = TASK.fields
    changed = messages(tmp_path / "m.jsonl", [{column: "another"}])
    with pytest.raises(UserError, match="predictions of another student or of another"):
        predict_files(student, [changed])


def test_an_empty_file_has_no_predictions_and_a_missing_one_is_named(student: str, tmp_path: Path) -> None:
    (made,) = predict_files(student, [messages(tmp_path / "empty.jsonl", [])])
    assert (made["rows"], made["labels"]) == (0, {})
    with pytest.raises(UserError, match=r"absent\.csv: no such file"):
        predict_files(student, [str(tmp_path / "absent.csv")])


def test_a_parquet_file_keeps_its_types(student: str, tmp_path: Path) -> None:
    (column,) = TASK.fields
    table = pa.table({column: ["It broke."] * 7, "price": pa.array(range(7), pa.float64())})
    pq.write_table(table, tmp_path / "m.parquet")
    (made,) = predict_files(student, [str(tmp_path / "m.parquet")])
    assert pyarrow.dataset.dataset(made["predictions"]).schema.field("price").type == pa.float64()
