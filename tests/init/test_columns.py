import csv
import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import UserError
from pipelines.init import columns
from pipelines.init.columns import Column, Sample, label_text, look_at, one_line

Row = dict[str, Any]


def sample_of(tmp_path: Path, rows: list[Row]) -> Sample:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return look_at(str(tmp_path / "rows.jsonl"))


def column_of(tmp_path: Path, values: list[Any], name: str = "x") -> Column:
    return sample_of(tmp_path, [{name: value} for value in values]).columns[name]


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("body", [f"my order {n} is late" for n in range(20)], "text"),
        ("word", ["cat", "dog", "fish", "bird", "cow", "ant", "bee", "fox", "owl"], "text"),  # all differ, and no ids
        ("文", ["今日は", "雨が降る", "明日", "晴れ", "雪", "風", "雲", "月", "星"], "text"),
        ("queue", ["a", "b"] * 10, "category"),
        ("spam", [True, False] * 10, "category"),
        ("queue", ["a", "b", None, ""] * 10, "category"),
        ("price", [1.5, 2, "3.25", "1,200"] * 3, "number"),
        ("equation", [f"( {n}.0 - 2.0 )" for n in range(20)], "number"),
        ("created", [f"2024-03-{n} 10:00" for n in range(10, 30)], "date"),
        ("created", [f"{n}.03.2024" for n in range(10, 30)], "date"),
        ("ticketID", ["a", "b"] * 10, "id"),
        ("key", [f"T-{n:04}" for n in range(20)], "id"),
        ("mail", [f"{sign}@example.org" for sign in "abcdefghij"], "id"),
        ("link", [f"https://example.org/{sign}" for sign in "abcdefghij"], "id"),
        ("", list(range(20)), "id"),
        ("Unnamed: 0", list(range(20)), "id"),
        ("choices", [["a", "b"]] * 9, "list"),
        ("answers", [{"text": ["a"]}] * 9, "object"),
        ("language", ["en"] * 9, "constant"),
        ("notes", [None, "", " "] * 3, "empty"),
    ],
)
def test_what_a_column_holds(tmp_path: Path, name: str, values: list[Any], kind: str) -> None:
    assert column_of(tmp_path, values, name).kind == kind


def test_a_text_that_three_rows_share_is_no_category(tmp_path: Path) -> None:
    premises = [f"A man with hat number {n} stands on a street corner and waits." for n in range(60)]
    assert column_of(tmp_path, premises * 3).kind == "text"


def test_a_column_counts_its_values_and_gaps(tmp_path: Path) -> None:
    column = column_of(tmp_path, ["b", "a", "b", None, "", "c"])
    assert (column.distinct, column.filled, column.gaps) == (3, 4, 1)
    assert column.examples[0] == "b"


def test_columns_of_rows_that_differ_are_all_found_in_order(tmp_path: Path) -> None:
    assert list(sample_of(tmp_path, [{"a": 1}, {"b": 2, "a": 1}, {"c": 3}]).columns) == ["a", "b", "c"]


def test_dates_and_numbers_of_parquet(tmp_path: Path) -> None:
    rows = [{"day": datetime.date(2024, 1, n + 1), "label": float(n % 3), "raw": b"\x00"} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    sample = look_at(str(tmp_path / "rows.parquet"))
    assert [column.kind for column in sample.columns.values()] == ["date", "number", "object"]
    assert set(sample.count("label")) == {"0", "1", "2"}


def test_a_file_sorted_by_label_shows_all_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SAMPLE_ROWS", 100)
    sample = sample_of(tmp_path, [{"text": f"t {n}", "label": "neg" if n < 1000 else "pos"} for n in range(2000)])
    assert (len(sample.rows), sample.read, sample.whole) == (100, 2000, True)
    assert set(sample.count("label")) == {"neg", "pos"}
    assert all(row["text"] == f"t {number - 1}" for number, row in sample.rows)
    assert [number for number, _ in sample.rows] == sorted({number for number, _ in sample.rows})


def test_the_sample_is_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SAMPLE_ROWS", 10)
    rows = [{"n": n} for n in range(500)]
    assert sample_of(tmp_path, rows).rows == sample_of(tmp_path, rows).rows


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "READ_ROWS", 50)
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "word\nother\n" * 100 + "too,many,cells\n")
    sample = look_at(str(path))
    assert (sample.read, sample.whole) == (50, False)


def test_long_rows_are_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "READ_CHARACTERS", 1_000_000)
    sample = sample_of(tmp_path, [{"text": "word " * 50_000} for _ in range(20)])
    assert 4 <= sample.read <= 5
    assert not sample.whole


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", ""), ("a.csv", "text,label\n"), ("a.jsonl", "\n"), ("a.json", "[]")]
)
def test_a_file_without_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"a\.(csv|jsonl?): no rows; give a file with one row for each example"):
        look_at(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_file_without_a_header(tmp_path: Path, suffix: str) -> None:
    with (tmp_path / f"sms.{suffix}").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="," if suffix == "csv" else "\t")
        writer.writerows([("spam", "ham")[n % 2], f"message number {n}"] for n in range(20))
    with pytest.raises(UserError, match=r"sms.*the first line looks like data, since 'spam' is also a value"):
        look_at(str(tmp_path / f"sms.{suffix}"))


def test_a_json_key_may_be_one_of_its_values(tmp_path: Path) -> None:
    assert column_of(tmp_path, ["label", "other"] * 10, "label").kind == "category"


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1"), (1.5, "1.5"), (1, "1"), (True, "True"), (" a\n b ", "a b"), ("1.0", "1.0")]
)
def test_a_value_as_a_label(value: object, text: str) -> None:
    assert label_text(value) == text


def test_one_line_of_what_would_break_a_table_or_a_comment() -> None:
    assert one_line("a\n\x1b[31mb\t\u2028c\x07") == "a �[31mb c�"
    assert one_line("x" * 100, 10) == "x" * 9 + "…"
