"""STAGE 4 `distill evaluate`: a split through the students with Ray Data → predictions and metrics.

Writes `predictions/*.parquet` (see `schema.PREDICTIONS`); accuracy with its bootstrap interval is in the
manifest.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.artifact import Artifact
from pipelines.comparison import bootstrap
from pipelines.console import say
from pipelines.errors import UserError
from pipelines.lineage import MODEL, Lineage
from pipelines.ray_session import ray_session
from pipelines.recipe import Run
from pipelines.schema import PREDICTIONS

if TYPE_CHECKING:
    from pipelines.predictor import Predictor


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
    right: dict[Run, list[bool]] = {run: [] for run, _ in todo}
    with ray_session(line.recipe.storage), ExitStack() as stack:
        writers = {run.name: (run, stack.enter_context(a.writer("predictions", PREDICTIONS))) for run, a in todo}
        for batch in _predictions(line, dataset, {run.name: line.student(run) for run, _ in todo}):
            for row in batch.to_pylist():
                run, writer = writers[row.pop("run")]
                writer.add(row)
                right[run].append(row["correct"])
    for run, artifact in todo:
        metrics = _metrics(right[run], settings.resamples)
        parents = [line.student(run), dataset]
        artifact.finish(line.snapshot(), parents, start, run=run.model_dump(), split=settings.split, metrics=metrics)
        say(
            f"  {run.name}: {settings.split} accuracy {metrics['accuracy']:.4f}"
            f" [{metrics['low']:.4f}, {metrics['high']:.4f}] on {metrics['rows']:,} rows"
        )
    return artifacts


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
    yield from scored.iter_batches(batch_format="pyarrow", batch_size=None)


def _metrics(right: list[bool], resamples: int) -> dict[str, float]:
    mean, low, high = bootstrap([np.array([right])], resamples)
    return {"accuracy": mean, "low": low, "high": high, "rows": len(right)}


class _Scorer:
    """Holds the students in one replica."""

    def __init__(self, students: dict[str, Artifact]) -> None:
        self.predictors = {name: open_student(student) for name, student in students.items()}

    def __call__(self, table: pa.Table) -> pa.Table:
        parts = [self._score(name, predictor, table) for name, predictor in self.predictors.items()]
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
        return scored.append_column("run", pa.array([name] * len(table)))


def open_student(student: Artifact) -> "Predictor":
    """The predictor of a train artefact, on whatever storage it lies."""
    from pipelines.predictor import Predictor  # seconds, and only those who score need it

    if student.local:
        return Predictor.open(student.path(MODEL))
    with tempfile.TemporaryDirectory() as folder:
        student.fs.get(student.path(MODEL) + "/", folder, recursive=True)
        return Predictor.open(folder)
