"""Which rows of the dataset a student learns from: a pure function of the rows and the run."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.recipe import Run
from pipelines.schema import Reason

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rationale:
    """Why a label is right, in a teacher's words."""

    text: str
    teacher: str = ""
    agreement: float = 1.0  # share of the row's samples that say its label


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One row to learn from; without a rationale it teaches its label alone."""

    row_id: str
    input: str
    label: str
    rationales: tuple[Rationale, ...] = ()
    agreement: float = 1.0  # with the label: 1 where it is gold


def draw_rows(dataset: Iterable[Row], run: Run) -> list[TrainRow]:
    """The rows that one student learns from, in the order of their draw.

    `labels: gold` takes the rows with a gold label; `labels: teacher` the rows that a teacher answered, with
    its label, and never looks at gold. A smaller fraction lies within a larger one of the same seed. What teachers
    other than the run's own say, if it has one, is left out.

    Returns:
        Rows with the label, and the usable rationales if the arm learns from any.
    """
    usable = [_train_row(row, run) for row in _usable(dataset, run)]
    usable.sort(key=lambda row: (position_in_unit(row.row_id, run.seed), row.row_id))
    return usable[: round(len(usable) * run.fraction)]


def count_rows(dataset: Iterable[Row], run: Run) -> tuple[int, int]:
    """How many rows `draw_rows` draws, and how many of them with rationales; at nine bytes a row."""
    positions, explained = array("d"), bytearray()
    for row in _usable(dataset, run):
        positions.append(position_in_unit(row["row_id"], run.seed))
        explained.append(bool(_train_row(row, run).rationales))
    drawn = np.argsort(np.frombuffer(positions))[: round(len(positions) * run.fraction)]
    return len(drawn), int(np.frombuffer(explained, bool)[drawn].sum())


def _usable(dataset: Iterable[Row], run: Run) -> Iterator[Row]:
    """The rows that have the run's kind of label, as its teacher has them if it hears but one."""
    heard = dataset if run.teacher is None else (_hear(row, run.teacher) for row in dataset)
    return (row for row in heard if row["label" if run.labels == "gold" else "teacher_label"] is not None)


def position_in_unit(row_id: str, seed: int | str = "") -> float:
    """A number in [0, 1) that depends on the row and the seed alone."""
    digest = hashlib.sha256(f"{seed}/{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _hear(row: Row, teacher: str) -> Row:
    """The row with what one teacher says of it. Its label is that of most of its texts, and of equals the first."""
    said = [r for r in row["rationales"] if r["teacher"] == teacher]
    labels = Counter(r["label"] for r in said if not r["rationalized"])
    return {**row, "rationales": said, "teacher_label": max(labels, key=labels.__getitem__, default=None)}


def _train_row(row: Row, run: Run) -> TrainRow:
    said, agreement = row["rationales"], 1.0
    if run.labels == "gold":
        label, fit = row["label"], [r for r in said if r["reason"] is None]
    else:  # this arm knows no gold: neither by a filter, nor by a rationale that was told it
        label, known = row["teacher_label"], (None, Reason.DISAGREES_WITH_GOLD)
        own = [r for r in said if not r["rationalized"] and r["label"] == label]
        fit = [r for r in own if r["reason"] in known]  # one that argues for another label explains nothing
        agreement = max((_agreement(r) for r in own), default=1.0)
    if run.arm == "standard":
        fit = []
    rationales = tuple(Rationale(r["rationale"], r["teacher"] or "", _agreement(r)) for r in fit)
    return TrainRow(row["row_id"], row["input"], label, rationales, agreement)


def _agreement(said: Row) -> float:
    return 1.0 if said["agreement"] is None else float(said["agreement"])
