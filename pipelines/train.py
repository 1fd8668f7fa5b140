"""STAGE 3 `distill train`: dataset → a student, by Ray Train and DeepSpeed around `student.py`.

Writes `model/`, a Hugging Face directory of the weights that were best on validation, with `distill.json`
beside them so that `predictor.py` knows the task. The history of the run is in the manifest.
"""

import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from pipelines.artifact import Artifact
from pipelines.console import console, say
from pipelines.draw import TrainRow, draw_rows
from pipelines.errors import UserError
from pipelines.lineage import MODEL, Lineage
from pipelines.ray_session import ray_session
from pipelines.recipe import Run, Student, resolve


def train_students(line: Lineage, runs: Sequence[Run], force: bool = False) -> list[Artifact]:
    """Train students, as many at once as the cluster has room for; those that were trained before are found done.

    Raises:
        UserError: the dataset is not there, or holds too little for one of the runs.
    """
    dataset = line.require(line.dataset, "dataset")
    if next(dataset.iter_rows("validation"), None) is None:
        raise UserError(f"{dataset.uri}: no validation rows, so no checkpoint can be chosen; give source.validation")
    artifacts = [line.student(run) for run in runs]
    for run, artifact in zip(runs, artifacts, strict=True):
        if force or not artifact.done():
            _check(run, draw_rows(dataset.iter_rows("train"), run), line.recipe.student.batch_size)
    todo = [(run, artifact) for run, artifact in zip(runs, artifacts, strict=True) if artifact.begin(force)]
    if todo:
        with (
            ray_session(),
            _progress([run.name for run, _ in todo], line.recipe.student.steps) as messages,
            ThreadPoolExecutor(_room(line.recipe.student)) as pool,
        ):
            trained = [pool.submit(_train, line, run, artifact, messages) for run, artifact in todo]
            try:
                for future in as_completed(trained):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return artifacts


def _train(line: Lineage, run: Run, artifact: Artifact, messages: Any) -> None:
    """Train one student into its artefact."""
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    start = time.time()
    student = line.recipe.student
    rows = draw_rows(line.dataset.iter_rows("train"), run)
    explained = sum(row.rationale is not None for row in rows)
    say(f"  {run.name}: {len(rows):,} labels, {explained:,} rationales, {student.steps:,} steps")
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={
            "dataset": line.dataset,
            "run": run,
            "student": student.model_copy(update={"model": resolve(student.model)}),
            "task": line.task.model_dump(mode="json"),
            "messages": messages,
        },
        scaling_config=ScalingConfig(
            num_workers=student.workers,
            use_gpu=student.gpus > 0,
            resources_per_worker={"CPU": student.cpus, **({"GPU": student.gpus} if student.gpus else {})},
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=artifact.uri,
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="accuracy", checkpoint_score_order="max"
            ),
        ),
    )
    result = trainer.fit()
    checkpoint, best = max(result.best_checkpoints, key=lambda pair: pair[1]["accuracy"])
    with checkpoint.as_directory() as folder:
        artifact.fs.put(f"{folder}/", artifact.path(MODEL) + "/", recursive=True)
    artifact.fs.rm(artifact.path("ray"), recursive=True)
    artifact.finish(
        line.snapshot(),
        [line.dataset],
        start,
        run=run.model_dump(),
        rows=len(rows),
        rationales=explained,
        best={"step": best["step"], "accuracy": best["accuracy"]},
        **result.return_value,
    )
    say(f"  {run.name}: validation accuracy {best['accuracy']:.4f} at step {best['step']}")


def _room(student: Student) -> int:
    """How many students the cluster can train at once."""
    import ray

    total = ray.cluster_resources()
    room = total.get("CPU", 0) // (student.workers * student.cpus)
    if student.gpus:
        room = min(room, total.get("GPU", 0) // (student.workers * student.gpus))
    return max(1, int(room))


def _check(run: Run, rows: Sequence[TrainRow], batch_size: int) -> None:
    if not rows:
        raise UserError(f"{run.name}: the dataset has no row with a {run.labels} label")
    if len(rows) < batch_size:
        raise UserError(
            f"{run.name}: fraction {run.fraction:g} leaves {len(rows)} rows, fewer than student.batch_size {batch_size}"
        )
    if run.arm == "step_by_step" and all(row.rationale is None for row in rows):
        raise UserError(f"{run.name}: no row has an accepted rationale, so there is nothing to explain; see the funnel")


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs."""
    import deepspeed
    import ray.train
    import torch
    from torch import distributed

    from pipelines.predictor import Predictor
    from pipelines.student import Collator, Objective, load_student, step_rows
    from pipelines.tasks import Task

    run, student = config["run"], config["student"]
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device = ray.train.torch.get_device()
    torch.manual_seed(run.seed)
    model, tokenizer = load_student(student.model, student.revision, student.init, student.dropout, run.seed)
    torch.manual_seed(run.seed * 1000 + rank)  # dropout differs between workers
    rows = draw_rows(config["dataset"].iter_rows("train"), run)
    validation = list(config["dataset"].iter_rows("validation"))
    # None of DeepSpeed's own operators is used, yet it compiles one, which takes g++ and half a minute
    deepspeed.ops.__compatible_ops__ = {}
    engine, _, _, _ = deepspeed.initialize(
        model=Objective(model, student.alpha),
        model_parameters=model.parameters(),
        config=_deepspeed_config(student, world),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _rate(step, student.warmup_steps, student.steps)
        ),
    )
    task = Task.model_validate(config["task"])
    collate = Collator(model, tokenizer, run.arm, student.max_input_tokens, student.max_target_tokens)
    predictor = Predictor(model, tokenizer, task, student.max_input_tokens)
    autocast = torch.autocast(device.type, torch.bfloat16) if student.precision == "bf16" else nullcontext()
    per_worker = student.batch_size // world
    history: list[dict[str, float]] = []
    losses: list[dict[str, float]] = []
    trained = 0.0
    for step in range(student.steps):
        began = time.time()
        mine = step_rows(rows, run.seed, step, student.batch_size)[rank * per_worker : (rank + 1) * per_worker]
        with autocast:
            loss, parts = engine(collate(mine))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"step {step}: loss {loss.item()} on rows {[row.row_id for row in mine]}")
        engine.backward(loss)
        engine.step()
        losses.append({"loss": loss.item(), **{name: part.item() for name, part in parts.items()}})
        trained += time.time() - began
        done = step + 1
        if rank == 0 and config["messages"] is not None and done % 10 == 0:
            config["messages"].put_nowait((run.name, done, losses[-1]["loss"]))
        if done % student.eval_every == 0 or done == student.steps:
            right = _count_right(predictor, task, validation, rank, world)
            total = torch.tensor([float(right)], device=device)
            distributed.all_reduce(total)
            metrics = {"step": done, "accuracy": float(total) / len(validation), **_means(losses)}
            history.append(metrics)
            losses.clear()
            with tempfile.TemporaryDirectory() as folder:
                _save(model, tokenizer, task, student, Path(folder), rank)
                checkpoint = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
                ray.train.report(metrics, checkpoint=checkpoint)
    truncated = torch.tensor([collate.truncation.inputs, collate.truncation.targets], device=device)
    distributed.all_reduce(truncated)
    return {
        "history": history,
        "train_seconds": round(trained, 2),
        "examples_per_second": round(student.steps * student.batch_size / trained, 1),
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "truncated": dict(zip(("inputs", "targets"), map(int, truncated.tolist()), strict=True)),
    }


def _deepspeed_config(student: Any, world: int) -> dict[str, Any]:
    # torch's own Adam: DeepSpeed's C++ one is compiled at first use
    adam = {"lr": student.learning_rate, "torch_adam": True, "fused": True}
    return {
        "train_micro_batch_size_per_gpu": student.batch_size // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage": student.zero_stage},
        "steps_per_print": 10**9,
    }


def _rate(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero; a share of the learning rate."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def _count_right(predictor: Any, task: Any, validation: list[dict[str, Any]], rank: int, world: int) -> int:
    """Rows of this worker's share that are predicted right. Shares are of one length, because under ZeRO 3
    all workers must run the same passes; what fills up the last share does not count."""
    share = -(-len(validation) // world)
    mine = validation[rank * share : (rank + 1) * share]
    filled = mine + validation[: share - len(mine)]
    made = predictor.predict([r["input"] for r in filled], [r["choices"] for r in filled])
    return sum(task.same(p.label, row["label"]) for p, row in zip(made, mine, strict=False))


def _save(model: Any, tokenizer: Any, task: Any, student: Any, folder: Path, rank: int) -> None:
    """The student's directory, whole, by rank 0; under ZeRO 3 all ranks gather it."""
    import deepspeed

    from pipelines.predictor import SIDECAR
    from pipelines.student import LABEL_PREFIX, save_student

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters) if student.zero_stage == 3 else nullcontext():
        if rank == 0:
            save_student(model, tokenizer, folder)
            facts = {
                "task": task.model_dump(mode="json"),
                "prefix": LABEL_PREFIX,
                "max_input_tokens": student.max_input_tokens,
            }
            (folder / SIDECAR).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _means(losses: list[dict[str, float]]) -> dict[str, float]:
    """Means over the steps since the last look; a part that some steps lack is averaged over those that have it."""
    names = dict.fromkeys(name for step in losses for name in step)
    return {name: sum(s[name] for s in losses if name in s) / sum(name in s for s in losses) for name in names}


@contextmanager
def _progress(names: Sequence[str], steps: int) -> Iterator[Any]:
    """A bar a student on a terminal, fed by the workers through a queue; elsewhere none, for nobody would see it."""
    if not console.is_terminal:
        yield None
        return
    from ray.util.queue import Queue

    messages = Queue(actor_options={"num_cpus": 0})
    columns = ("  {task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[loss]}")
    with Progress(*columns, console=console, transient=True) as progress:
        bars = {name: progress.add_task(name, total=steps, loss="") for name in names}

        def follow() -> None:
            while (message := messages.get()) is not None:
                name, step, loss = message
                progress.update(bars[name], completed=step, loss=f"loss {loss:.3f}")

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield messages
        finally:
            messages.put(None)
            thread.join(timeout=5)
            messages.shutdown()
