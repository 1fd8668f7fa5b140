"""Texts that the user already has, from their files to generations."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.engines.outputs import given_outputs
from pipelines.errors import UserError
from pipelines.schema import GENERATIONS
from pipelines.tasks import Task

Row = dict[str, Any]
MOOD = Task.model_validate(
    {"name": "mood", "input": "{text}", "answer": {"kind": "choice", "labels": ["good", "bad"]}, "label": "mood"}
)
NOTE = Task.model_validate({"name": "note", "input": "{title}: {body}", "answer": {"kind": "text"}})
QUIZ = Task.model_validate(
    {"name": "quiz", "input": "{question}", "answer": {"kind": "row_choice", "choices": "choices"}}
)


def examples(*inputs: str, task: Task = NOTE, left_out: tuple[int, ...] = ()) -> list[Row]:
    return [
        {"row_id": task.row_id(text), "split": "train", "position": position, "input": text}
        for position, text in enumerate(inputs)
        if position not in left_out
    ]


def write(tmp_path: Path, name: str, content: list[Any]) -> str:
    """JSON lines for rows; an array for anything else."""
    rows = all(isinstance(value, dict) for value in content)
    (tmp_path / name).write_text("".join(json.dumps(v) + "\n" for v in content) if rows else json.dumps(content))
    return str(tmp_path / name)


def join(
    tmp_path: Path, asked: list[Row], *parts: list[Any], task: Task = NOTE, rows_read: int | None = None, **kw: Any
) -> list[Row]:
    files = [write(tmp_path, f"texts_{number}.jsonl", part) for number, part in enumerate(parts)]
    read = len(asked) if rows_read is None else rows_read
    return list(given_outputs(task, "train", files, iter(asked), read, **kw))


def said(rows: list[Row]) -> list[tuple[int, str, str | None]]:
    return [(row["sample"], row["text"], row["error"]) for row in rows]


ERROR = "no output was given for this row"


# by row_id, or by what it is made of


def test_a_text_becomes_a_generation(tmp_path: Path) -> None:
    (example,) = examples("a: b")
    (made,) = join(tmp_path, [example], [{"row_id": example["row_id"], "text": "Because. So the answer is x."}])
    assert made == {
        "row_id": example["row_id"],
        "split": "train",
        "sample": 0,
        "teacher": "outputs",
        "prompt_hash": "",
        "text": "Because. So the answer is x.",
        "finish_reason": "outputs",
        "error": None,
        "input_tokens": None,
        "cached_tokens": None,
        "output_tokens": None,
    }
    assert list(made) == GENERATIONS.names


def test_texts_are_joined_by_the_tasks_columns_whatever_their_order(tmp_path: Path) -> None:
    rows = [{"title": "c", "body": " d", "text": "2"}, {"title": "a", "body": "b ", "text": "1", "more": 0}]
    assert said(join(tmp_path, examples("a: b", "c: d"), rows)) == [(0, "1", None), (0, "2", None)]


def test_row_ids_and_columns_may_stand_side_by_side(tmp_path: Path) -> None:
    asked = examples("a: b", "c: d")
    rows = [{"row_id": asked[1]["row_id"], "text": "2"}, {"row_id": "", "title": "a", "body": "b", "text": "1"}]
    assert [text for _, text, _ in said(join(tmp_path, asked, rows))] == ["1", "2"]


def test_an_example_without_a_text_has_an_error(tmp_path: Path) -> None:
    rows = [{"title": "c", "body": "d", "text": ""}]
    made = join(tmp_path, examples("a: b", "c: d"), rows)
    assert said(made) == [(0, "", ERROR), (0, "", None)]
    assert [row["finish_reason"] for row in made] == ["error", "outputs"]


def test_several_texts_of_a_row_are_its_samples_in_the_order_of_the_files(tmp_path: Path) -> None:
    asked = examples("a: b", "c: d")
    first = [{"title": "a", "body": "b", "text": "one"}, {"title": "c", "body": "d", "text": "other"}]
    second = [{"row_id": asked[0]["row_id"], "text": "two"}, {"title": "a", "body": "b", "text": "one"}]
    assert said(join(tmp_path, asked, first, second)) == [
        (0, "one", None),
        (1, "two", None),
        (2, "one", None),
        (0, "other", None),
    ]


def test_texts_of_no_example_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"row_id": "nowhere", "text": "1"}, {"row_id": "nowhere", "text": "2"}, {"row_id": 7, "text": "3"}]
    assert said(join(tmp_path, examples("a: b"), rows)) == [(0, "", ERROR)]
    assert "texts_0.jsonl: 3 texts belong to no example of this split" in capsys.readouterr().out


def test_nothing_is_said_where_every_text_has_its_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    join(tmp_path, examples("a: b"), [{"title": "a", "body": "b", "text": "1"}])
    assert capsys.readouterr().out == ""


def test_parquet_and_csv_are_read_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"title": ["a"], "body": ["b"], "text": ["1"]}), tmp_path / "one.parquet")
    (tmp_path / "other.csv").write_text('title,body,text\nc,d,"2\n3"\n')
    files = [str(tmp_path / "one.parquet"), str(tmp_path / "other.csv")]
    made = list(given_outputs(NOTE, "train", files, examples("a: b", "c: d"), 2))
    assert said(made) == [(0, "1", None), (0, "2\n3", None)]


@pytest.mark.parametrize("text", ["a\x00b", "\u202eשלום 🧾", "e\u0301", "\ufffd", "x" * 100_000, " \n"])
def test_any_text_comes_through_as_it_is(tmp_path: Path, text: str) -> None:
    asked = examples("a: b")
    assert join(tmp_path, asked, [{"row_id": asked[0]["row_id"], "text": text}])[0]["text"] == text
    assert join(tmp_path, asked, [text])[0]["text"] == text


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"title": "c", "body": "d"}, NOTE, "no 'text', the string that holds the teacher's answer"),
        ({"title": "c", "body": "d", "text": None}, NOTE, "no 'text'"),
        ({"title": "c", "body": "d", "text": ["1"]}, NOTE, "no 'text'"),
        ({"title": "c", "text": "1"}, NOTE, "neither 'row_id' nor the columns title, body"),
        ({"question": "Where?", "choices": "bank", "text": "1"}, QUIZ, "'choices' must be a list"),
        ("1", NOTE, "expected an object with named fields, not '1'"),
    ],
)
def test_a_row_at_fault_is_named(tmp_path: Path, row: Any, task: Task, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"row_id": "a", "text": "1"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError) as error:
        list(given_outputs(task, "train", [str(path)], examples("a: b"), 1))
    assert str(error.value).startswith(f"{path}, row 2: {message}")


def test_a_file_without_rows_gives_every_example_an_error(tmp_path: Path) -> None:
    assert said(join(tmp_path, examples("a: b"), [])) == [(0, "", ERROR)]


# by position: the reference layout


def test_bare_texts_are_joined_in_the_order_of_the_source(tmp_path: Path) -> None:
    asked = examples("a", "b", "c")
    assert said(join(tmp_path, asked, ["1", "2"], ["3"])) == [(0, "1", None), (0, "2", None), (0, "3", None)]


def test_texts_of_rows_that_were_left_out_are_passed_over(tmp_path: Path) -> None:
    asked = examples("a", "b", "c", "d", "e", left_out=(0, 2, 3))
    made = join(tmp_path, asked, ["1", "2", "3", "4", "5"], rows_read=5)
    assert [row["row_id"] for row in made] == [NOTE.row_id("b"), NOTE.row_id("e")]
    assert [row["text"] for row in made] == ["2", "5"]
    assert join(tmp_path, [], ["1", "2"], rows_read=2) == []


def test_null_among_bare_texts_is_no_text(tmp_path: Path) -> None:
    made = join(tmp_path, examples("a", "b"), [None, "2"])
    assert said(made) == [(0, "", ERROR), (0, "2", None)]


@pytest.mark.parametrize("texts", [["1"], ["1", "2", "3"], ["1", "2", "3", "4"]])
def test_as_many_texts_as_rows_are_needed(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match=f"hold {len(texts)} texts, but the source has 2 rows"):
        join(tmp_path, examples("a", "b"), texts)


def test_with_a_limit_there_may_be_more_texts_but_not_fewer(tmp_path: Path) -> None:
    asked = examples("a", "b")
    assert said(join(tmp_path, asked, ["1", "2", "3"], limited=True)) == [(0, "1", None), (0, "2", None)]
    with pytest.raises(UserError, match="hold 1 texts"):
        join(tmp_path, asked, ["1"], limited=True)


@pytest.mark.parametrize("value", [7, {"text": "2"}, ["2"], True])
def test_bare_texts_are_strings(tmp_path: Path, value: object) -> None:
    with pytest.raises(UserError, match=r"texts_0\.jsonl, text 2: expected a string or null"):
        join(tmp_path, examples("a", "b"), ["1", value])
