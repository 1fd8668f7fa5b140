"""Artefacts as the stages write them, for reports to be made over; no Ray, no model."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.artifact import Artifact
from pipelines.lineage import Lineage
from pipelines.metrics import calibrate, classify, cover
from pipelines.recipe import Recipe, Run
from pipelines.schema import PREDICTIONS, REJECTED, TRIALS

ROWS = 200
FUNNEL = {
    "train": {"accepted": 70, "disagrees_with_gold": 20, "unparsable": 10},
    "test": {"accepted": 198, "truncated": 2},
}
TEACHER = {"train": {"accuracy": 0.75, "rows": 100}, "test": {"accuracy": 0.84, "rows": ROWS}}
COUNTS = {
    "test": {
        "kept": ROWS,
        "duplicates": 1,
        "in_another_split": 0,
        "near_duplicates": 0,
        "near_leaks": 0,
        "unlabelled": 0,
    },
    "train": {
        "kept": 90,
        "duplicates": 0,
        "in_another_split": 7,
        "near_duplicates": 0,
        "near_leaks": 3,
        "unlabelled": 0,
    },
}
UNREADABLE = {
    **{"row_id": "00001", "split": "train", "sample": 0, "reason": "unparsable", "detail": "no answer sentence"},
    "text": "I would rather not say. " * 20 + "averyveryverylongwordthatnobreakcanbefoundin" * 4,
}
TWO_ARMS = {"arm": ["standard", "step_by_step"]}
STANDARD, STEP = Run(arm="standard"), Run(arm="step_by_step")


def lineage(tmp_path: Path, runs: list[dict[str, Any]], **keys: Any) -> Lineage:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "a", "label": "refund"}\n', encoding="utf-8")
    task = tmp_path / "task.yaml"
    if not task.exists():
        task.write_text(
            "name: t\ninput: '{text}'\nanswer: {kind: choice, labels: [refund, decline]}\n", encoding="utf-8"
        )
    content = {
        "name": "small",
        "storage": str(tmp_path / "runs"),
        "task": str(task),
        "source": {"root": str(tmp_path), "train": "train.jsonl", "test": "test.jsonl"},
        "teacher": {"model": "some/teacher"},
        "student": {"model": "some/student"},
        "runs": runs,
    }
    return Lineage(Recipe.model_validate(content | keys))


def write(
    line: Lineage,
    right: Mapping[Run, int],
    validation: Mapping[Run, float] | None = None,
    funnel: Mapping[str, Mapping[str, int]] = FUNNEL,
    teacher: Mapping[str, Mapping[str, float]] = TEACHER,
) -> Lineage:
    """All artefacts before the report over the runs of `right`: each has its first so many of 200 rows right."""
    finish(line, line.examples, counts=COUNTS)
    finish(line, line.generations, rows=300, input_tokens=120_000, output_tokens=9_000, engine_seconds=36)
    line.rationales.begin(force=True)
    line.rationales.write_table("rejected/0", pa.Table.from_pylist([UNREADABLE], REJECTED))
    finish(line, line.rationales, funnel=funnel, teacher_accuracy=teacher)
    finish(line, line.dataset, counts={"validation": 9}, validation_from_train=True)
    for run in right:
        write_student(line, run, (validation or {}).get(run, 0.5))
        write_evaluation(line, run, right[run])
    return line


def write_search(line: Lineage, chosen: list[Run]) -> None:
    """A search that trained the chosen students to their end and stopped the others."""
    trials = [
        {
            **run.model_dump(),
            **{"name": run.name, "key": line.student(run).key, "chosen": run in chosen, "step": 20, "seconds": 30.0},
            **{"tokens_read": 500, "tokens_written": 100, "state": "done" if run in chosen else "stopped"},
            "score": 0.4 + 0.1 * run.seed + 0.2 * (run.alpha or 0) + 0.1 * run.fraction,
        }
        for run in line.recipe.search.points()
    ]
    line.search.begin(force=True)
    line.search.write_table("trials", pa.Table.from_pylist(trials, TRIALS))
    finish(line, line.search, chosen=[run.model_dump() for run in chosen], counts={"done": len(chosen)})


def finish(line: Lineage, artifact: Artifact, **facts: Any) -> None:
    artifact.finish(line.snapshot(), [], time.time() - 10, **facts)


def write_student(line: Lineage, run: Run, validation: float) -> None:
    """70 of 100 labels came with a rationale."""
    finish(
        line,
        line.student(run),
        run=run.model_dump(),
        rows=round(100 * run.fraction),
        rationales=round(70 * run.fraction) if run.arm == "step_by_step" else 0,
        best={"step": 40, "score": validation, "accuracy": validation},
        history=[{"step": 40, "accuracy": validation}],
        train_seconds=7.5,
        examples_per_second=100.0,
        parameters=1_234_567 if run.model is None else 617_000,
        tokens={"read": 3_000, "written": 1_000},
    )


def write_evaluation(line: Lineage, run: Run, right: int, rows: int = ROWS) -> None:
    """Every row is to be refunded; where the student is wrong it declines."""
    artifact = line.evaluation(run)
    artifact.begin(force=True)
    order = np.random.default_rng(run.seed).permutation(rows)  # replicas write rows in any order
    table = [
        {
            **{"row_id": f"{row:05d}", "input": f"message {row}", "label": "refund", "confidence": 0.75},
            **{"prediction": "refund" if row < right else "decline", "correct": bool(row < right)},
        }
        for row in order
    ]
    half = rows // 2
    artifact.write_table("predictions/0", pa.Table.from_pylist(table[:half], schema=PREDICTIONS))
    artifact.write_table("predictions/1", pa.Table.from_pylist(table[half:], schema=PREDICTIONS))
    accuracy = right / rows
    outcomes = [bool(row < right) for row in order]
    sure = [0.9 if correct else 0.6 for correct in outcomes]
    metrics = {
        **{"accuracy": accuracy, "low": accuracy - 0.06, "high": accuracy + 0.05, "rows": rows},
        **{"invalid": 0, "milliseconds": 12.5, "coverage": cover(outcomes, sure), **calibrate(outcomes, sure)},
        **classify(
            ["refund"] * rows, ["refund" if correct else "decline" for correct in outcomes], ["refund", "decline"]
        ),
    }
    artifact.finish(
        line.snapshot(), [], time.time(), run=run.model_dump(), split=line.recipe.evaluate.split, metrics=metrics
    )
