"""STAGE 2 `distill dataset`: accepted rationales ⋈ examples by row_id → training rows and splits.

Writes `train`, `validation` and `test` (see `schema.DATASET`). All students of a recipe read this one
artefact; which rows each of them learns from is drawn by `draw.py`.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.artifact import Artifact
from pipelines.console import say, show_table
from pipelines.draw import position_in_unit
from pipelines.lineage import Lineage
from pipelines.schema import DATASET
from pipelines.tasks import Task

Row = dict[str, Any]


def build_dataset(line: Lineage, force: bool = False) -> Artifact:
    """Make the dataset artefact, or find it done.

    Raises:
        UserError: the rationales are not there yet.
    """
    artifact = line.dataset
    examples, rationales = line.examples, line.require(line.rationales, "rationales")
    if not artifact.begin(force):
        return artifact
    start = time.time()
    splits = examples.manifest()["counts"]
    said = _by_row(rationales)
    carve = "validation" not in splits and "train" in splits
    counts: Counter[str] = Counter()
    with (
        artifact.writer("train", DATASET) as train,
        artifact.writer("validation", DATASET) as validation,
        artifact.writer("test", DATASET) as test,
    ):
        writers = {"train": train, "unlabelled": train, "validation": validation, "test": test}
        for split in splits:
            for example in examples.iter_rows(split):
                name = split
                if carve and split == "train" and _held_out(example, line.recipe.source.validation_share):
                    name = "validation"
                learnt = name in ("train", "unlabelled")
                row = _dataset_row(line.task, example, said.get(example["row_id"], []) if learnt else [])
                writers[name].add(row)
                counts[name] += 1
                counts["gold"] += learnt and row["label"] is not None
                counts["rationale"] += any(r["reason"] is None for r in row["rationales"])
                counts["teacher_label"] += row["teacher_label"] is not None
    if carve:
        say(f"  no validation split is given: {counts['validation']:,} rows of train were held out for it, by row_id")
    artifact.finish(line.snapshot(), [examples, rationales], start, counts=dict(counts), validation_from_train=carve)
    _show(counts)
    return artifact


def _held_out(example: Row, share: float) -> bool:
    """Whether a row of train measures instead; without gold it can't."""
    return example["label"] is not None and position_in_unit(example["row_id"]) < share


def _by_row(rationales: Artifact) -> dict[str, list[Row]]:
    """Row id → what teachers said of it, where a label could be read: accepted, or rejected with the reason."""
    said: dict[str, list[Row]] = {}
    for row in rationales.iter_rows("accepted"):
        said.setdefault(row["row_id"], []).append({**row, "reason": None})
    for row in rationales.iter_rows("rejected"):
        if row["label"] is not None:
            said.setdefault(row["row_id"], []).append(row)
    return said


def _dataset_row(task: Task, example: Row, said: Sequence[Row]) -> Row:
    ordered = sorted(said, key=lambda r: (r["teacher"], r["sample"]))
    return {
        **example,
        "teacher_label": _first_label(task, ordered, example["choices"]),
        "rationales": [{key: r[key] for key in ("teacher", "sample", "rationale", "label", "reason")} for r in ordered],
    }


def _first_label(task: Task, said: Sequence[Row], choices: Sequence[str] | None) -> str | None:
    labels: Iterator[str | None] = (task.canonical(r["label"], choices) for r in said if r["label"] is not None)
    return next(labels, None)


def _show(counts: Counter[str]) -> None:
    rows = [
        ["learnt from", f"{counts['train'] + counts['unlabelled']:,}"],
        ["  with a gold label", f"{counts['gold']:,}"],
        ["  with a teacher's label", f"{counts['teacher_label']:,}"],
        ["  with an accepted rationale", f"{counts['rationale']:,}"],
        ["validation", f"{counts['validation']:,}"],
        ["test", f"{counts['test']:,}"],
    ]
    show_table("Dataset", ["", "rows"], rows)
