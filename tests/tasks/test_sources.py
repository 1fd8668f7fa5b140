import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import UserError
from pipelines.tasks.sources import read_rows, read_values

ROWS = [{"text": "one", "label": "a"}, {"text": "zwei\n„ü“ 🧾", "label": "b"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
ARRAY = json.dumps(ROWS, indent=2)
CSV = 'text,label\none,a\n"zwei\n„ü“ 🧾",b\n'
BOM = "\ufeff"


def read(tmp_path: Path, name: str, content: str | bytes) -> list[Any]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(str(path)))


def problem(tmp_path: Path, name: str, content: str | bytes) -> str:
    """What is said of a file, without the file's name, which must stand first."""
    with pytest.raises(UserError) as error:
        read(tmp_path, name, content)
    message = str(error.value)
    assert message.startswith(str(tmp_path / name))
    assert "\n" not in message
    return message.removeprefix(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl", LINES + "\n\n  \n"),
        ("rows.jsonl", BOM + LINES.replace("\n", "\r\n")),
        ("rows.json", ARRAY),
        ("rows.json", BOM + "\n\n " + ARRAY),
        ("rows", ARRAY.replace("\n", "")),
        ("rows.csv", CSV),
        ("rows.csv", BOM + CSV),
        ("rows.CSV", CSV),
        ("rows.tsv", CSV.replace(",", "\t")),
    ],
)
def test_the_same_rows_from_every_form_of_text(tmp_path: Path, name: str, content: str) -> None:
    assert read(tmp_path, name, content) == ROWS


def test_the_same_rows_from_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert list(read_rows(str(tmp_path / "rows.parquet"))) == ROWS


def test_parquet_keeps_lists_and_nulls(tmp_path: Path) -> None:
    rows = [{"choices": ["a", "b"], "label": None}, {"choices": None, "label": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read_rows(str(tmp_path / "rows.parquet"))) == rows


def test_rows_from_other_storage() -> None:
    with fsspec.open("memory://sources/rows.csv", "w", encoding="utf-8", newline="") as file:
        file.write(CSV)
    assert list(read_rows("memory://sources/rows.csv")) == ROWS


def test_rows_come_as_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES + "\nnot json")
    assert next(read_rows(str(tmp_path / "rows.jsonl"))) == ROWS[0]


def test_values_may_be_bare_strings(tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text('["a", "b"]')
    assert list(read_values(str(tmp_path / "texts.json"))) == ["a", "b"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv"])
@pytest.mark.parametrize("content", ["", BOM, "\n\n"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str, content: str) -> None:
    assert read(tmp_path, name, content) == []


def test_a_csv_of_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path, "rows.csv", "text,label\n") == []


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_long_text_is_read_whole(tmp_path: Path, name: str) -> None:
    text = "wörd " * 60_000
    content = json.dumps({"text": text}) if name.endswith("l") else f"text\n{text}\n"
    assert read(tmp_path, name, content) == [{"text": text}]


def test_escaped_halves_of_a_sign_are_put_together(tmp_path: Path) -> None:
    assert read(tmp_path, "rows.jsonl", r'{"text": "\ud83e\uddfe"}') == [{"text": "🧾"}]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.jsonl: no such file"):
        list(read_rows(str(tmp_path / "absent.jsonl")))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(read_rows(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.jsonl", '{"a": 1}\n\nnot json', ", line 3: not JSON: Expecting value at column 1"),
        ("r.jsonl", '{"a": 1}\n{"a": }', ", line 2: not JSON: Expecting value at column 7"),
        ("r.jsonl", '{"a": 1} {"a": 2}', ", line 1: not JSON: Extra data at column 10"),
        ("r.json", '\n\n[{"a": 1},\n {"a": }]', ", line 4: not JSON: Expecting value"),
        ("r.json", '[{"a": 1}', ", line 1: not JSON: "),
        ("r.jsonl", b'{"a": "x"}\n{"a": "\xff"}', ", line 2: not UTF-8 (byte 8 of the line)"),
        ("r.jsonl", '{"a": "x"}'.encode("utf-16"), ", line 1: not UTF-8"),
        ("r.csv", b"a,b\n1,2\n3,\xe4\n", ", line 3: not UTF-8"),
        ("r.jsonl", '{"n": ' + "9" * 5000 + "}", ", line 1: not JSON: "),
        ("r.jsonl", "[" * 100_000, ", line 1: not JSON: "),
        ("r.jsonl", '{"a": ' * 100_000, ", line 1: not JSON: "),
    ],
    ids=range(11),
)
def test_what_is_not_utf_8_or_not_json_is_named_by_its_line(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    message = problem(tmp_path, name, content)
    assert message.startswith(said)
    assert len(message) < 200


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (r'{"text": "\\ud83e", "n": "\u00fc"}' + "\n" + r'{"text": "cut \ud83e"}', r", line 2: \ud83e is half a sign"),
        (r'[{"text": "a"}, {"text": "\uDDFE"}]', r", row 2: \uddfe is half a sign"),
    ],
)
def test_half_a_sign_is_named(tmp_path: Path, content: str, said: str) -> None:
    assert problem(tmp_path, "r.json", content).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('["a", "b"]', ", row 1: expected an object with named fields, not 'a'"),
        ('{"a": 1}\n[1, 2]\n{"a": 2}', ", row 2: expected an object with named fields, not [1, 2]"),
        ('{"a": 1}\n3\n', ", row 2: expected an object with named fields, not 3"),
        ('[{"a": 1}, null]', ", row 2: expected an object with named fields, not None"),
        (json.dumps(["x" * 100_000]), ", row 1: expected an object"),
    ],
)
def test_a_row_that_is_no_object_is_shown(tmp_path: Path, content: str, said: str) -> None:
    message = problem(tmp_path, "r.json", content)
    assert message.startswith(said)
    assert len(message) < 200


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n3\n", ", line 3: not as many cells as the header has"),
        ("a,b\n1,2,3\n", ", line 2: not as many cells as the header has"),
        ('a,b\n1,"2\n', ", line 2: unexpected end of data"),
        ('a,b\n"1"x,2\n', ", line 2: "),
    ],
)
def test_what_is_not_csv_is_named_by_its_line(tmp_path: Path, content: str, said: str) -> None:
    assert problem(tmp_path, "r.csv", content).startswith(said)


@pytest.mark.parametrize("content", [b"", b"text,label\n", b"PAR1" + b"\x00" * 20 + b"PAR1"])
def test_what_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    assert problem(tmp_path, "r.parquet", content).startswith(": can't be read as Parquet")
