"""Rows from JSON lines, a JSON array, CSV or Parquet; local or any fsspec URI."""

import csv
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError

Row = dict[str, Any]


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a file, one dict each.

    `.csv` (with a header), `.tsv`, `.parquet` by their ending; anything else is JSON, an array or one
    object a line.

    Raises:
        UserError: no such file, not UTF-8, not JSON, a row that is no object; the sentence names the line.
    """
    for number, row in enumerate(read_values(path), 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: expected an object with named fields, not {_short(row)}")
        yield row


def read_values(path: str) -> Iterator[Any]:
    """As `read_rows`, but rows may be any JSON value, such as the strings of the reference layout."""
    fs, name = fsspec.core.url_to_fs(path)
    if not fs.isfile(name):
        raise UserError(f"{path}: no such file")
    match PurePosixPath(name).suffix.lower():
        case ".parquet":
            yield from _read_parquet(fs, name, path)
        case ".csv":
            yield from _read_delimited(path, ",")
        case ".tsv":
            yield from _read_delimited(path, "\t")
        case _:
            yield from _read_json(path)


def _read_json(path: str) -> Iterator[Any]:
    lines = _text_lines(path)
    first = True
    for number, line in lines:
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            yield from _read_array(path, number, line + "".join(rest for _, rest in lines))
            return
        first = False
        value = _parse(path, number, line)
        if "\\u" in line:
            _check_text(f"{path}, line {number}", value)
        yield value


def _read_array(path: str, first_line: int, text: str) -> Iterator[Any]:
    escapes = "\\u" in text
    for number, value in enumerate(_parse(path, first_line, text), 1):
        if escapes:
            _check_text(f"{path}, row {number}", value)
        yield value


def _parse(path: str, first_line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}, line {line}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a tower of brackets
        raise UserError(f"{path}, line {first_line}: not JSON: {error}") from error


def _check_text(where: str, value: Any) -> None:
    """JSON can spell half of a sign beyond U+FFFF, as texts do that were cut; no file can hold such a string."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: \\u{ord(error.object[error.start]):04x} is half a sign, without the other half"
        ) from error


def _read_delimited(path: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a cell may be as long as a JSON string
    reader = csv.DictReader((line for _, line in _text_lines(path)), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num}: not as many cells as the header has")
            yield row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.reader.line_num}: {error}") from error


def _read_parquet(fs: fsspec.AbstractFileSystem, name: str, path: str) -> Iterator[Row]:
    try:
        with fs.open(name, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:  # OSError: what Arrow says of a broken header
        raise UserError(f"{path}: can't be read as Parquet: {str(error).strip()}") from error


def _text_lines(path: str) -> Iterator[tuple[int, str]]:
    """(line number, line), each decoded by itself so that a bad byte is named by its line."""
    with fsspec.open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line)") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
