"""Rows for the report to browse: rejected texts of each kind, and rows on which students disagree."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifact import Artifact
from pipelines.lineage import Lineage
from pipelines.recipe import Run
from pipelines.schema import REJECTED

_REJECTS, _ROWS = 2, 30  # of each reason; of disagreements
_LONGEST = 600  # characters of a text


@dataclass(frozen=True)
class Reject:
    """A text that was rejected."""

    reason: str
    detail: str
    text: str
    split: str


@dataclass(frozen=True)
class Disputed:
    """A row that students answer differently; `answers` are label, confidence and whether it is right, of each run."""

    input: str
    gold: str
    teacher: str | None
    answers: dict[str, tuple[str, float, bool]]


def rejects(rationales: Artifact) -> list[Reject]:
    """Two texts of each reason, the first ones."""
    found: dict[str, list[Reject]] = defaultdict(list)
    columns = ["reason", "detail", "text", "split"]
    for batch in rationales.scan("rejected", REJECTED, columns):
        for reason in pc.unique(batch.column("reason")).to_pylist():
            wanted = _REJECTS - len(found[reason])
            rows = batch.filter(pc.equal(batch.column("reason"), reason)).slice(0, max(0, wanted)).to_pylist()
            found[reason] += [
                Reject(reason, row["detail"] or "", _short(row["text"] or ""), row["split"]) for row in rows
            ]
    return [reject for reason in sorted(found) for reject in found[reason]]


def disputed(line: Lineage, runs: Sequence[Run]) -> list[Disputed]:
    """Rows that one student of each arm, learnt from most of the same labels, answer differently.

    Of more rows than can be shown, those that stand first by row_id: a sample that has nothing to do with the answers.
    """
    shown = _one_of_each_arm(runs)
    if len(shown) < 2:
        return []
    tables = {run.name: line.evaluation(run).read_table("predictions").sort_by("row_id").to_pylist() for run in shown}
    differ = [rows for rows in zip(*tables.values(), strict=True) if len({row["prediction"] for row in rows}) > 1]
    differ = differ[:_ROWS]
    said = _teacher_labels(line, {rows[0]["row_id"] for rows in differ})
    return [
        Disputed(
            _short(rows[0]["input"]),
            rows[0]["label"],
            said.get(rows[0]["row_id"]),
            {
                name: (row["prediction"] or row["text"] or "", row["confidence"] or 0.0, row["correct"])
                for name, row in zip(tables, rows, strict=True)
            },
        )
        for rows in differ
    ]


def _one_of_each_arm(runs: Sequence[Run]) -> list[Run]:
    """With the labels that most arms learnt from, the largest fraction, the first seed."""
    arms_by_labels = {labels: {run.arm for run in runs if run.labels == labels} for labels in ("gold", "teacher")}
    labels = max(arms_by_labels, key=lambda name: len(arms_by_labels[name]))
    best: dict[str, Run] = {}
    for run in runs:
        if run.labels == labels and (run.arm not in best or run.fraction > best[run.arm].fraction):
            best[run.arm] = run
    return list(best.values())


def _teacher_labels(line: Lineage, row_ids: set[str]) -> dict[str, str]:
    said: dict[str, str] = {}
    wanted = pc.field("row_id").isin(pa.array(sorted(row_ids), pa.string()))
    for folder in ("accepted", "rejected"):
        dataset = line.rationales.dataset(folder, REJECTED)
        for row in dataset.to_table(columns=["row_id", "label"], filter=wanted).to_pylist():
            if row["label"] is not None:
                said.setdefault(row["row_id"], row["label"])
    return said


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
