"""What is in a data file: a sample of its rows, and what kind of values each column holds."""

import itertools
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.errors import UserError
from pipelines.tasks.expression import ExpressionError, evaluate
from pipelines.tasks.sources import Row, read_rows

READ_ROWS = 100_000  # looked at, so that a file that is sorted by its labels shows them all
READ_CHARACTERS = 200_000_000  # or fewer rows, where they are long
SAMPLE_ROWS = 10_000  # of those read, kept and judged
MAX_LABELS = 200  # of a closed set; a prompt that lists more is no help
MAX_NUMBERS = 12  # as a closed set: ratings and months, but not quantities
SHORT_VALUE = 30  # characters
FEWEST_IDS = 8  # values, before they are taken for ids because all differ

_ID_WORDS = {"id", "uid", "uuid", "guid", "idx", "index"}
_ID_VALUE = re.compile(r"[!-~]*[\d@][!-~]*|\w+://\S+")
_DATE_VALUE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}(?:[T ].*)?")

ColumnKind = Literal["text", "category", "number", "date", "id", "list", "object", "constant", "empty"]


@dataclass(frozen=True)
class Column:
    """What the values of a column are, over the rows of a sample."""

    name: str
    kind: ColumnKind
    distinct: int
    filled: int
    gaps: int  # rows where it is null or absent, which a run refuses; an empty string is no gap
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """Rows drawn evenly from the first `read` rows of a file, each with its number, from 1, and their columns."""

    file: str
    rows: list[tuple[int, Row]]
    columns: dict[str, Column]
    read: int
    whole: bool  # nothing comes after the rows read

    def filled(self, column: str) -> list[Row]:
        """The rows that have a value in a column."""
        return [row for _, row in self.rows if not is_empty(row.get(column))]

    def count(self, column: str) -> Counter[str]:
        """How often each value stands in a column, as `label_text`."""
        return Counter(label_text(row[column]) for row in self.filled(column))


def look_at(file: str) -> Sample:
    """A sample of a file's rows, the same ones every time, and what their columns are.

    Raises:
        UserError: the file can't be read, has no rows, or is a CSV whose first line is no header.
    """
    rows, draw = read_rows(file), random.Random(0)
    kept: list[tuple[int, Row]] = []
    read, room = 0, READ_CHARACTERS
    for row in itertools.islice(rows, READ_ROWS):
        read += 1
        if len(kept) < SAMPLE_ROWS:
            kept.append((read, row))
        elif (place := draw.randrange(read)) < SAMPLE_ROWS:  # reservoir sampling
            kept[place] = (read, row)
        room -= len(str(row))
        if room < 0:
            break
    if not kept:
        raise UserError(f"{file}: no rows; give a file with one row for each example")
    kept.sort(key=lambda pair: pair[0])
    names = dict.fromkeys(name for _, row in kept for name in row)
    columns = {name: _describe(name, [row.get(name) for _, row in kept]) for name in names}
    if file.lower().endswith((".csv", ".tsv")):
        for column in columns.values():
            if column.kind == "category" and any(row[column.name] == column.name for _, row in kept):
                raise UserError(
                    f"{file}: the first line looks like data, since {one_line(column.name)!r} is also a value of its "
                    "own column; put a line with the names of the columns before it"
                )
    return Sample(file, kept, columns, read, whole=next(rows, None) is None)


def _describe(name: str, values: Sequence[Any]) -> Column:
    filled = [value for value in values if not is_empty(value)]
    counts = Counter(map(label_text, filled))
    kind = _column_kind(name, filled, counts, len(values))
    gaps = sum(value is None for value in values)
    return Column(name, kind, len(counts), len(filled), gaps, tuple(text for text, _ in counts.most_common(3)))


def _column_kind(name: str, filled: Sequence[Any], counts: Counter[str], rows: int) -> ColumnKind:
    if not filled:
        return "empty"
    if any(isinstance(value, dict | bytes) for value in filled):
        return "object"
    if any(isinstance(value, list) for value in filled):
        return "list"
    if len(counts) == 1 and len(filled) == rows > 1:
        return "constant"
    if all(map(_DATE_VALUE.fullmatch, counts)):
        return "date"
    if words(name) & _ID_WORDS and not any(" " in text for text in counts):
        return "id"
    if all(map(is_arithmetic, counts)):
        return "id" if not name or name.startswith("Unnamed: ") else "number"  # the index that pandas writes
    if len(counts) == rows >= FEWEST_IDS and all(map(_ID_VALUE.fullmatch, counts)):
        return "id"
    return "category" if recurs(counts) else "text"


def recurs(counts: Counter[str]) -> bool:
    """Whether values are a closed set: few, of which short ones come three times on average. Long ones, which may be
    a text that several rows share, must come twenty times."""
    most = MAX_NUMBERS if all(map(is_arithmetic, counts)) else MAX_LABELS
    if not 2 <= len(counts) <= most:
        return False
    times = 3 if statistics.median(map(len, counts)) <= SHORT_VALUE else 20
    return counts.total() >= times * len(counts)


def label_text(value: object) -> str:
    """A value as the text of a label: a whole float, as integers with gaps are read, without its zero."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return " ".join(str(value).split())


def is_empty(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value).strip() == ""


def is_arithmetic(text: str) -> bool:
    try:
        evaluate(text)
    except ExpressionError:
        return False
    return True


def one_line(text: str, limit: int = 60) -> str:
    """A text from a user's file as it can stand in a table, a comment or a sentence."""
    line = "".join(sign if sign.isprintable() else "�" for sign in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def snake(name: str) -> str:
    """`ticketId` and `Ticket ID` as `ticket_id`."""
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)).strip("_").lower()


def words(name: str) -> set[str]:
    """The words that a column's name is made of."""
    return set(snake(name).split("_"))
