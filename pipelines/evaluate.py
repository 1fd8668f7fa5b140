"""STAGE 4 `distill evaluate`: a split through the students with Ray Data → predictions and metrics.

Writes `predictions/*.parquet` (see `schema.PREDICTIONS`); accuracy with its bootstrap interval, F1, calibration,
coverage, and how long one answer takes are in the manifest.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.artifact import Artifact
from pipelines.comparison import bootstrap
from pipelines.console import say
from pipelines.errors import UserError
from pipelines.lineage import MODEL, Lineage
from pipelines.metrics import calibrate, classify, cover
from pipelines.ray_session import ray_session, tables
from pipelines.recipe import Run
from pipelines.schema import PREDICTIONS
from pipelines.tasks import Task

if TYPE_CHECKING:
    from pipelines.predictor import Predictor


_Todo = tuple[Run, Artifact]
_HELD = 10**9  # parameters of the students that a replica holds at once
_TIMED = 20  # rows whose answers are timed, one at a time


def evaluate_students(line: Lineage, runs: Sequence[Run], force: bool = False) -> list[Artifact]:
    """Score trained students in one pass over the split; those that were scored before are found done.

    Raises:
        UserError: a student or the split is not there.
    """
    settings = line.recipe.evaluate
    dataset = line.require(line.dataset, "dataset")
    for run in runs:
        line.require(line.student(run), "train")
    artifacts = [line.evaluation(run) for run in runs]
    todo = [(run, artifact) for run, artifact in zip(runs, artifacts, strict=True) if artifact.begin(force)]
    if not todo:
        return artifacts
    start = time.time()
    if next(dataset.iter_rows(settings.split), None) is None:
        raise UserError(f"{dataset.uri}: the {settings.split} split is empty; give source.{settings.split}")
    with ExitStack() as held, ray_session(line.recipe.storage):
        for _, artifact in todo:
            held.enter_context(artifact.lease())
        for group in _together(line, todo):
            _evaluate(line, dataset, group, start)
    if told := line.rationales.manifest()["teacher_accuracy"].get(settings.split):
        say(f"  the teacher, few-shot: {settings.split} accuracy {told['accuracy']:.4f} on {told['rows']:,} rows")
    return artifacts


def _evaluate(line: Lineage, dataset: Artifact, group: Sequence[_Todo], start: float) -> None:
    """Score students in one pass over the split."""
    settings = line.recipe.evaluate
    answers: dict[Run, _Answers] = {run: _Answers() for run, _ in group}
    with ExitStack() as stack:
        writers = {run.name: (run, stack.enter_context(a.writer("predictions", PREDICTIONS))) for run, a in group}
        for batch in _predictions(line, dataset, {run.name: line.student(run) for run, _ in group}):
            for row in batch.to_pylist():
                run, writer = writers[row.pop("run")]
                answers[run].add(row)
                writer.add(row)
    for run, artifact in group:
        metrics = answers[run].metrics(line.task, settings.resamples)
        parents = [line.student(run), dataset]
        artifact.finish(line.snapshot(), parents, start, run=run.model_dump(), split=settings.split, metrics=metrics)
        say(
            f"  {run.name}: {settings.split} accuracy {metrics['accuracy']:.4f}"
            f" [{metrics['low']:.4f}, {metrics['high']:.4f}] on {metrics['rows']:,} rows"
        )


def _together(line: Lineage, todo: Sequence[_Todo]) -> Iterator[list[_Todo]]:
    """Students that a replica can hold at once."""
    group: list[_Todo] = []
    held = 0
    for run, artifact in todo:
        parameters = line.student(run).manifest()["parameters"]
        if group and held + parameters > _HELD:
            yield group
            group, held = [], 0
        group.append((run, artifact))
        held += parameters
    yield group


def _predictions(line: Lineage, dataset: Artifact, students: dict[str, Artifact]) -> Iterator[pa.Table]:
    """`schema.PREDICTIONS` with the run's name, of every student, from Ray Data's replicas."""
    import ray

    settings = line.recipe.evaluate
    rows = ray.data.read_parquet(dataset.path(settings.split), filesystem=None if dataset.local else dataset.fs)
    rows.context.execution_options.label_selector = settings.node_labels or None
    scored = rows.map_batches(
        _Scorer,
        fn_constructor_args=(students,),
        batch_format="pyarrow",
        batch_size=settings.batch_size,
        compute=ray.data.ActorPoolStrategy(size=settings.replicas),
        num_cpus=settings.cpus,
        num_gpus=settings.gpus,
    )
    yield from tables(scored)


@dataclass
class _Answers:
    """What the metrics of one student are computed from; of each row no more than that."""

    correct: list[bool] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    gold: list[str] = field(default_factory=list)
    predicted: list[str | None] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)  # of single answers

    def add(self, row: dict[str, Any]) -> None:
        self.correct.append(row["correct"])
        self.confidence.append(row["confidence"])
        self.gold.append(row["label"])
        self.predicted.append(row["prediction"])
        if (took := row.pop("milliseconds")) is not None:
            self.milliseconds.append(took)

    def metrics(self, task: Task, resamples: int) -> dict[str, Any]:
        mean, low, high = bootstrap([np.array([self.correct])], resamples)
        closed = task.answer.kind == "choice"
        return {
            "accuracy": mean,
            "low": low,
            "high": high,
            "rows": len(self.correct),
            "invalid": self.predicted.count(None),
            **(classify(self.gold, self.predicted, task.answer.labels) if closed else {}),
            **calibrate(self.correct, self.confidence),
            "coverage": cover(self.correct, self.confidence),
            "milliseconds": float(np.median(self.milliseconds)),
        }


class _Scorer:
    """Holds the students in one replica."""

    def __init__(self, students: dict[str, Artifact]) -> None:
        self.predictors = {name: open_student(student) for name, student in students.items()}
        self.timed = False

    def __call__(self, table: pa.Table) -> pa.Table:
        parts = [self._score(name, predictor, table) for name, predictor in self.predictors.items()]
        self.timed = True
        return pa.concat_tables(parts)

    def _score(self, name: str, predictor: "Predictor", table: pa.Table) -> pa.Table:
        made = predictor.predict(table["input"].to_pylist(), table["choices"].to_pylist(), batch_size=len(table))
        same = [predictor.task.same(p.label, gold) for p, gold in zip(made, table["label"].to_pylist(), strict=True)]
        columns = {
            **{column: table[column] for column in ("row_id", "input", "label")},
            "prediction": [p.label for p in made],
            "text": [p.text for p in made],
            "confidence": [p.confidence for p in made],
            "correct": same,
        }
        scored = pa.table(columns).cast(PREDICTIONS)
        took = [] if self.timed else self._time(predictor, table.slice(0, _TIMED + 1))
        times = pa.array([*took, *[None] * (len(table) - len(took))], pa.float64())
        return scored.append_column("milliseconds", times).append_column("run", pa.array([name] * len(table)))

    def _time(self, predictor: "Predictor", table: pa.Table) -> list[float]:
        """How long answers to one input at a time take; the first is no measure."""
        took = []
        for row in table.to_pylist():
            start = time.perf_counter()
            predictor.predict([row["input"]], [row["choices"]])
            took.append(1000 * (time.perf_counter() - start))
        return took[1:] or took


def open_student(student: Artifact) -> "Predictor":
    """The predictor of a train artefact, on whatever storage it lies."""
    from pipelines.predictor import Predictor  # seconds, and only those who score need it

    if student.local:
        return Predictor.open(student.path(MODEL))
    with tempfile.TemporaryDirectory() as folder:
        student.fs.get(student.path(MODEL) + "/", folder, recursive=True)
        return Predictor.open(folder)
