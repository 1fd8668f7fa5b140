"""STAGE 3 `distill train`: dataset → students, by Ray Train and DeepSpeed.

Writes `model/`, a Hugging Face directory of the weights that were best on validation, with `distill.json` beside them
so that `predictor.py` knows the task; `losses.parquet`, step by step; and `tensorboard/`. The looks at validation are
in the manifest. What the workers do is in `train_worker.py`. Until a student is done, `ray/` holds its checkpoints:
killed and run again, it goes on from the last.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import pyarrow as pa

from pipelines.artifact import Artifact
from pipelines.console import say, show_table
from pipelines.deepspeed_config import deepspeed_config, read_config
from pipelines.draw import count_rows
from pipelines.errors import UserError
from pipelines.lineage import BEST, MODEL, Lineage
from pipelines.progress import progress_of
from pipelines.ray_session import ray_session
from pipelines.recipe import Run, Student, resolve
from pipelines.schema import LOSSES
from pipelines.tracking import check_trackers

_RAY = "ray"  # the folder of Ray Train's checkpoints


def train_students(line: Lineage, runs: Sequence[Run], force: bool = False) -> list[Artifact]:
    """Train students, as many at once as the cluster has room for; those that were trained before are found done.

    Raises:
        UserError: the dataset is not there, or holds too little for one of the runs; the others are trained first.
    """
    student = line.recipe.student
    dataset = line.require(line.dataset, "dataset")
    if next(dataset.iter_rows("validation"), None) is None:
        raise UserError(f"{dataset.uri}: no validation rows, so no checkpoint can be chosen; give source.validation")
    deepspeed_config(student, read_config(student.deepspeed) if student.deepspeed else None)
    check_trackers(student.trackers)
    artifacts = {run: line.student(run) for run in runs}
    undone = [run for run in runs if force or not artifacts[run].done()]
    lacks = {run: _lack(run, *count_rows(dataset.iter_rows("train"), run), student.batch_size) for run in undone}
    todo = [run for run in runs if not lacks.get(run) and artifacts[run].begin(force, go_on=True)]
    refused = [lack for lack in lacks.values() if lack]
    for lack in refused:
        say(f"  left out: {lack}")
    if todo:
        with (
            ray_session(line.recipe.storage),
            progress_of(line.recipe.name, student.steps) as messages,
            ThreadPoolExecutor(room(student)) as pool,
        ):
            trained = [pool.submit(train_student, line, run, messages) for run in todo]
            try:
                for future in as_completed(trained):
                    error = future.exception()
                    if isinstance(error, UserError):
                        refused.append(str(error))
                    elif error is not None:
                        raise error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        _show([run for run in todo if artifacts[run].done()], artifacts, student.metric)
    if refused:
        raise UserError("; ".join(refused))
    return list(artifacts.values())


def _lack(run: Run, rows: int, explained: int, batch_size: int) -> str | None:
    """Why a student can't be trained on so many rows, of which so many are explained."""
    if not rows:
        return f"{run.name}: the dataset has no row with a {run.labels} label"
    if rows < batch_size:
        return f"{run.name}: fraction {run.fraction:g} leaves {rows} rows, fewer than student.batch_size {batch_size}"
    if run.arm != "standard" and not explained:
        return f"{run.name}: no row has an accepted rationale, so there is nothing to explain; see the funnel"
    return None


def train_student(line: Lineage, run: Run, messages: Any, callbacks: Sequence[Any] = ()) -> None:
    """Train one student into its artefact, or go on with it.

    Args:
        messages: a queue, see `progress.py`.
        callbacks: of Ray Train.

    Raises:
        UserError: its rows or its loss won't do, or another run is at work on it.
    """
    artifact = line.student(run)
    with artifact.lease():
        start = time.time()
        rows, explained = count_rows(line.dataset.iter_rows("train"), run)
        steps = line.recipe.student.steps
        say(f"  {run.name}: {rows:,} labels, {explained:,} rationales, {steps:,} steps")
        made = _fit(line, run, artifact, messages, callbacks)
        if "refused" in made:
            raise UserError(made["refused"])
        state = made["state"]
        best = artifact.path(f"{BEST}/{state['best_step']}")
        if artifact.fs.exists(best):  # not if we were killed after this and before the manifest
            artifact.fs.mv(best, artifact.path(MODEL), recursive=True)
        artifact.write_table("losses", pa.Table.from_pylist(state["losses"], LOSSES))
        artifact.finish(
            line.snapshot(),
            [line.dataset],
            start,
            run=run.model_dump(),
            rows=rows,
            rationales=explained,
            steps=state["step"],
            stopped_early=state["stopped_early"],
            best={"step": state["best_step"], "score": state["best_score"], "accuracy": state["best_accuracy"]},
            history=state["history"],
            train_seconds=round(state["train_seconds"], 2),
            tokens={"read": state["tokens_read"], "written": state["tokens_written"]},
            examples_per_second=round(state["step"] * line.recipe.student.batch_size / state["train_seconds"], 1),
            parameters=made["parameters"],
            cut=made["cut"],
        )
        for folder in (BEST, _RAY):
            if artifact.fs.exists(artifact.path(folder)):
                artifact.fs.rm(artifact.path(folder), recursive=True)


def _fit(line: Lineage, run: Run, artifact: Artifact, messages: Any, callbacks: Sequence[Any]) -> dict[str, Any]:
    """What the first worker returned."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    student = line.recipe.student_of(run)
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={
            "project": line.recipe.name,
            "run": run,
            "student": student.model_copy(update={"model": resolve(student.model)}),
            "deepspeed": deepspeed_config(student, read_config(student.deepspeed) if student.deepspeed else None),
            "task": line.task,
            "dataset": line.dataset,
            "artifact": artifact,
            "messages": messages,
        },
        scaling_config=ScalingConfig(
            num_workers=student.workers,
            use_gpu=student.gpus > 0,
            resources_per_worker={"CPU": student.cpus, **({"GPU": student.gpus} if student.gpus else {})},
            label_selector=student.node_labels or None,
        ),
        run_config=RunConfig(
            name=_RAY,  # a name that stays, by which Ray Train finds its checkpoints again
            storage_path=artifact.uri if artifact.local else artifact.path(),
            storage_filesystem=None if artifact.local else PyFileSystem(FSSpecHandler(artifact.fs)),
            checkpoint_config=CheckpointConfig(num_to_keep=student.checkpoints_kept),
            failure_config=FailureConfig(max_failures=student.max_failures),
            callbacks=list(callbacks),
        ),
    )
    made: dict[str, Any] = trainer.fit().return_value
    return made


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    from pipelines.train_worker import Job, train_worker  # in the worker alone: it imports DeepSpeed

    return train_worker(Job(**config))


def room(student: Student) -> int:
    """How many students the cluster can train at once."""
    import ray

    labels = student.node_labels.items()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and labels <= node["Labels"].items()]
    room = sum(node.get("CPU", 0) for node in nodes) // (student.workers * student.cpus)
    if student.gpus:
        room = min(room, sum(node.get("GPU", 0) for node in nodes) // (student.workers * student.gpus))
    return max(1, int(room))


def _show(runs: Sequence[Run], artifacts: dict[Run, Artifact], metric: str) -> None:
    """What was trained, and what the last students that learnt to explain write."""
    rows = []
    for run in runs:
        made = artifacts[run].manifest()
        best, cut = made["best"], made["cut"]
        early = " (early)" if made["stopped_early"] else ""
        rows.append(
            [
                run.name,
                f"{best['score']:.4f}",
                f"{best['step']:,} of {made['steps']:,}{early}",
                f"{made['examples_per_second']:,.1f}",
                f"{cut['inputs'] + cut['rationales']:,}",
            ]
        )
    show_table("Students", ["validation", metric, "best step", "examples/s", "cut"], rows)
    for run in runs:
        explained = artifacts[run].manifest()["history"][-1]["explained"]
        if explained:
            say(f"  {run.name} explains {explained[0]['input'][:120]!r}: {explained[0]['rationale'][:200]!r}")
