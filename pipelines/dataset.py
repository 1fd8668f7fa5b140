"""STAGE 2 `distill dataset`: accepted rationales ⋈ examples by row_id → training rows and splits.

Writes `train`, `validation` and `test` (see `schema.DATASET`). All students of a recipe read this one
artefact; which rows each of them learns from is drawn by `draw.py`.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.artifact import Artifact
from pipelines.console import say, show_table, track
from pipelines.draw import position_in_unit
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.schema import DATASET
from pipelines.scratch import RowsById, scratch_database
from pipelines.tasks import Task

Row = dict[str, Any]
_SAID = ("teacher", "sample", "rationale", "label", "agreement", "rationalized", "reason")


def build_dataset(line: Lineage, force: bool = False) -> Artifact:
    """Make the dataset artefact, or find it done.

    Raises:
        UserError: the rationales are not there yet, or further ones are of other rows.
    """
    artifact = line.dataset
    sources = [line.require(line.rationales, "rationales"), *line.further_rationales]
    if len({source.uri for source in sources}) < len(sources):
        raise UserError("dataset.rationales: the same rationales stand there twice, or are the recipe's own")
    if artifact.begin(force):
        with artifact.lease():
            _join(line, artifact, sources)
    return artifact


def _join(line: Lineage, artifact: Artifact, sources: Sequence[Artifact]) -> None:
    start, examples, rationales = time.time(), line.examples, line.rationales
    splits = examples.manifest()["counts"]
    carve = "validation" not in splits and "train" in splits
    counts: Counter[str] = Counter()
    found: Counter[str] = Counter()  # rows that an artefact has something to say of
    with (
        scratch_database() as database,
        artifact.writer("train", DATASET) as train,
        artifact.writer("validation", DATASET) as validation,
        artifact.writer("test", DATASET) as test,
    ):
        said = RowsById(database)
        for source in sources:
            said.extend(_said(source))
        writers = {"train": train, "unlabelled": train, "validation": validation, "test": test}
        rows = (example for split in splits for example in examples.iter_rows(split))
        for example in track(rows, "  joining", sum(count["kept"] for count in splits.values())):
            name = example["split"]
            if carve and name == "train" and _held_out(example, line.recipe.source.validation_share):
                name = "validation"
            learnt = name in ("train", "unlabelled")
            of_row = said.find(example["row_id"]) if learnt else []
            found.update({r["source"] for r in of_row})
            row = _dataset_row(line.task, example, of_row)
            writers[name].add(row)
            counts[name] += 1
            counts["gold"] += learnt and row["label"] is not None
            counts["rationale"] += any(r["reason"] is None for r in row["rationales"])
            counts["teacher_label"] += row["teacher_label"] is not None
    for source in line.further_rationales:
        if not found[source.uri]:
            raise UserError(
                f"dataset.rationales: {source.uri} speaks of none of the rows that students learn from; "
                "give rationales of the same task and source"
            )
    if carve:
        say(f"  no validation split is given: {counts['validation']:,} rows of train were held out for it, by row_id")
    artifact.finish(
        line.snapshot(),
        [examples, rationales],
        start,
        counts=dict(counts),
        rows_of_rationales=dict(found),
        validation_from_train=carve,
    )
    _show(counts)


def _held_out(example: Row, share: float) -> bool:
    """Whether a row of train measures instead; without gold it can't."""
    return example["label"] is not None and position_in_unit(example["row_id"]) < share


def _said(rationales: Artifact) -> Iterator[Row]:
    """What teachers said, where a label could be read: accepted, or rejected with the reason."""
    for folder in ("accepted", "rejected"):
        for row in rationales.iter_rows(folder):
            if row["label"] is not None:
                said = {name: row.get(name) for name in _SAID}
                yield {"row_id": row["row_id"], "source": rationales.uri, **said}


def _dataset_row(task: Task, example: Row, said: Sequence[Row]) -> Row:
    ordered = sorted(said, key=lambda r: (r["teacher"], r["sample"]))
    return {**example, "teacher_label": _teacher_label(task, ordered, example["choices"]), "rationales": ordered}


def _teacher_label(task: Task, said: Sequence[Row], choices: Sequence[str] | None) -> str | None:
    """The label that most texts say; of equally many, the one that was said first. Where the gold label was told, it
    is not the teacher's."""
    labels = [task.canonical(r["label"], choices) for r in said if not r["rationalized"]]
    counts = Counter(label for label in labels if label is not None)
    votes = {label: sum(n for other, n in counts.items() if task.same(label, other)) for label in counts}
    return max(votes, key=votes.__getitem__, default=None)


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
