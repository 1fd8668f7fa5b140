"""What each worker of Ray Train runs: `student.Objective` under DeepSpeed, step by step.

A step is a function of the run, the step's number and the weights: its rows come from `batches.Schedule`, its
dropout from a generator that is seeded anew, and its loss is one mean over all workers. So a run that is killed and
goes on from a checkpoint takes the same steps.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import ray.train
import torch
from ray.util import get_current_placement_group
from torch import distributed

from pipelines.artifact import Artifact
from pipelines.batches import Schedule, deal
from pipelines.deepspeed_config import Config
from pipelines.draw import TrainRow, draw_rows
from pipelines.errors import UserError
from pipelines.lineage import BEST
from pipelines.metrics import classify
from pipelines.predictor import Predictor
from pipelines.recipe import TWO_TASKS, Run, Student
from pipelines.student import Batch, Collator, Objective, load_student
from pipelines.tasks import Task
from pipelines.tracking import Tracker

_TAG, _STATE = "shards", "state.json"
_SHOWN = 3  # validation rows whose rationales people see
_COUNTED = 4096  # rows tokenised at once


@dataclass(frozen=True)
class Job:
    """What a worker is told."""

    project: str
    run: Run
    student: Student
    deepspeed: Config
    task: Task
    dataset: Artifact
    artifact: Artifact  # where the best weights go
    messages: Any  # a queue: lines to show, and how far the run is


@dataclass
class State:
    """How far a run is. Lies in every checkpoint."""

    key: str
    workers: int
    zero_stage: int
    step: int = 0
    best_step: int = 0
    best_score: float = -1.0
    best_accuracy: float = -1.0  # at that step
    looks_since_best: int = 0
    train_seconds: float = 0.0
    tokens_read: int = 0  # by the encoder, over all workers
    tokens_written: int = 0  # that the decoder learnt
    stopped_early: bool = False
    losses: list[dict[str, float]] = field(default_factory=list)  # of each step
    history: list[dict[str, Any]] = field(default_factory=list)  # of each look at validation


def train_worker(job: Job) -> dict[str, Any]:
    """Train, and report to Ray Train; `refused` in what is returned is the user's mistake.

    Ray would wrap an exception in tracebacks, and a worker that ends alone would leave the others waiting: so all of
    them end, with the same sentence.
    """
    worker, problem = None, None
    try:
        worker = _Worker(job)
    except UserError as error:  # perhaps on this node alone
        problem = str(error)
    gathered: list[Any] = [None] * ray.train.get_context().get_world_size()
    distributed.all_gather_object(gathered, problem)
    if worker is None or any(gathered):
        return {"refused": next(sentence for sentence in gathered if sentence)}
    try:
        worker.prepare()
        return worker.train()
    except UserError as error:  # from here on all workers come to the same one
        return {"refused": str(error)}


class _Worker:
    """One worker. Making it takes no other; everything after does."""

    def __init__(self, job: Job) -> None:
        self.job, self.run, self.student = job, job.run, job.student
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        rows = self.rows = draw_rows(job.dataset.iter_rows("train"), self.run)
        self.validation = list(job.dataset.iter_rows("validation"))
        s = self.student
        self.model, self.tokenizer = load_student(
            s.model, s.revision, s.init, s.dropout, self.run.seed, s.local_files_only
        )
        teachers = sorted({r.teacher for row in rows for r in row.rationales}) if s.rationales == "per_teacher" else ()
        self.schedule = Schedule(rows, self.run.seed, s.batch_size, s.batch_by_length, s.rationales)
        self.collate = Collator(
            self.model,
            self.tokenizer,
            self.run.arm,
            s.max_input_tokens,
            s.max_target_tokens,
            s.prefix,
            teachers,
            s.weigh_by_agreement,
            self.run.seed,
        )
        self.objective = Objective(self.model, s.alpha)
        longest = s.max_target_tokens + 64 if self.run.arm == "rationale_first" else 64
        self.predictor = Predictor(
            self.model, self.tokenizer, job.task, s.max_input_tokens, longest, self.run.arm, s.prefix
        )
        if s.zero_stage == 3:
            self.predictor.all_done = self._all_done
        self.state = State(job.artifact.key, self.world, s.zero_stage)

    def prepare(self) -> None:
        """Look at the rows, start the engine, go on from a checkpoint if there is one.

        Raises:
            UserError: a label is too long, or the checkpoint is not this run's.
        """
        self.cut = self._count_cut(self.rows)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            self.engine = self._engine()
        else:
            with checkpoint.as_directory() as folder:
                self._restore(folder)
        self.tracker = self._tracker() if self.rank == 0 else None

    def train(self) -> dict[str, Any]:
        s, state = self.student, self.state
        saved = time.monotonic()
        while state.step < s.steps and not state.stopped_early:
            due = s.checkpoint_minutes is not None and time.monotonic() - saved > s.checkpoint_minutes * 60
            due = self._step(due)
            last = state.step == s.steps
            looked = last or state.step % s.eval_every == 0
            if looked:
                self._look()
            due = due or last or state.stopped_early or state.step % s.checkpoint_every == 0
            if due:
                self._checkpoint()
                saved = time.monotonic()
            elif looked:
                ray.train.report(self._metrics())
        if self.tracker:
            self.tracker.close()
        return {
            "state": asdict(state),
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters()),
            "cut": dict(zip(("inputs", "rationales"), self.cut, strict=True)),
        }

    def _step(self, due: bool) -> bool:
        """One step of the optimizer. Returns whether a checkpoint is due, on which all workers must agree."""
        began = time.monotonic()
        s, state, step = self.student, self.state, self.state.step
        parts = deal(self.schedule.step(step), self.world * s.gradient_accumulation)
        mine = parts[self.rank * s.gradient_accumulation :][: s.gradient_accumulation]
        batches = [self.collate(part) for part in mine]
        totals = torch.stack([*(batch.totals() for batch in batches)]).sum(dim=0)
        read, written = (sum(counts) for counts in zip(*(batch.tokens for batch in batches), strict=True))
        agreed = torch.cat([totals, totals.new_tensor([float(due and self.rank == 0), read, written])])
        distributed.all_reduce(agreed)
        totals, (due_now, read, written) = agreed[:2], agreed[2:].tolist()
        torch.manual_seed(((self.run.seed * 1_000_003 + step) * 1009 + self.rank) % 2**63)
        sums = torch.zeros_like(totals)
        for batch in batches:
            sums += self._learn(batch, totals)
        own_are_finite = bool(sums.isfinite().all())
        distributed.all_reduce(sums)
        if not sums.isfinite().all():
            self._refuse_loss([] if own_are_finite else [row.row_id for part in mine for row in part])
        seconds = time.monotonic() - began
        losses = self.objective.losses(sums, totals)
        state.step += 1
        state.train_seconds += seconds
        state.tokens_read += int(read)
        state.tokens_written += int(written)
        state.losses.append({"step": state.step, **losses})
        if self.tracker:
            speed = s.batch_size / seconds
            rate = self.engine.get_lr()[0]
            self.tracker.log(state.step, {**losses, "examples_per_second": speed, "learning_rate": rate})
            if state.step % 10 == 0:
                self.job.messages.put_nowait(("step", self.run.name, state.step, losses, speed))
        return bool(due_now > 0)

    def _learn(self, batch: Batch, totals: torch.Tensor) -> torch.Tensor:
        autocast = (
            torch.autocast(self.device.type, torch.bfloat16) if self.student.precision == "bf16" else nullcontext()
        )
        sums: torch.Tensor
        with autocast:
            loss, sums = self.engine(batch, totals)
        # DeepSpeed takes the mean over workers, where the shares of the loss are to be summed
        self.engine.backward(loss * self.world, scale_wrt_gas=False)
        self.engine.step()
        return sums

    def _rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero; a share of the learning rate."""
        warmup, steps = self.student.warmup_steps, self.student.steps
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (steps - step) / max(1, steps - warmup))

    def _refuse_loss(self, row_ids: list[str]) -> None:
        """The loss is no number: say where.

        Raises:
            UserError: always.
        """
        gathered: list[Any] = [None] * self.world
        distributed.all_gather_object(gathered, row_ids)
        where = ", ".join(row_id for part in gathered for row_id in part)
        raise UserError(
            f"{self.run.name}: at step {self.state.step + 1} the loss is no number, on rows {where}; lower "
            "student.learning_rate, or take student.precision fp32"
        )

    def _count_cut(self, rows: Sequence[TrainRow]) -> tuple[int, int]:
        """How many inputs and rationales are longer than the limits; each worker looks at its share.

        Raises:
            UserError: a label is; on all workers alike.
        """
        found: Any = [0, 0]
        mine = rows[self.rank :: self.world]
        try:
            for at in range(0, len(mine), _COUNTED):
                inputs, rationales = self.collate.count_cut(mine[at : at + _COUNTED])
                found = [found[0] + inputs, found[1] + rationales]
        except UserError as error:
            found = str(error)
        gathered: list[Any] = [None] * self.world
        distributed.all_gather_object(gathered, found)
        for part in gathered:
            if isinstance(part, str):
                raise UserError(part)
        inputs, rationales = (sum(part[i] for part in gathered) for i in (0, 1))
        if self.rank == 0 and (inputs or rationales):
            s = self.student
            self._say(
                f"{inputs:,} inputs (of more than {s.max_input_tokens} tokens) and {rationales:,} rationales (of more "
                f"than {s.max_target_tokens}) are cut; of {len(rows):,} rows"
            )
        return inputs, rationales

    # what is looked at

    def _look(self) -> None:
        """Measure on validation; keep the weights if they are the best so far."""
        s, state = self.student, self.state
        scores = self._score()
        score = scores[s.metric]
        since = state.losses[state.history[-1]["step"] if state.history else 0 :]
        look = {"step": state.step, **scores, **_means(since), "explained": self._explain()}
        state.history.append(look)
        if score > state.best_score:
            state.best_step, state.best_score, state.looks_since_best = state.step, score, 0
            state.best_accuracy = scores["accuracy"]
            self._keep_best()
        else:
            state.looks_since_best += 1
            state.stopped_early = s.patience is not None and state.looks_since_best >= s.patience
        if self.tracker:
            self.tracker.log(state.step, {f"validation_{name}": value for name, value in scores.items()})
            self.job.messages.put_nowait(("look", self.run.name, scores["accuracy"]))
            self.tracker.keep()
            told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items())
            self._say(f"step {state.step:,}: validation {told}, loss {look['loss']:.4f}")

    def _score(self) -> dict[str, float]:
        """Accuracy on validation, and macro-F1 if it goes by that."""
        gathered: list[Any] = [None] * self.world
        distributed.all_gather_object(gathered, self._predict())
        rows, task = self.validation, self.job.task
        predicted = [label for of_worker in gathered for label in of_worker]
        right = sum(task.same(label, row["label"]) for label, row in zip(predicted, rows, strict=True))
        scores = {"accuracy": right / len(rows)}
        if self.student.metric == "macro_f1":
            gold = [row["label"] for row in rows]
            scores["macro_f1"] = classify(gold, predicted, task.answer.labels)["macro_f1"]
        return scores

    def _predict(self) -> list[str | None]:
        """The labels of this worker's share of validation. Shares are of one length, because under ZeRO 3 all workers
        must run the same passes; what fills up the last share is left out."""
        rows = self.validation
        share = -(-len(rows) // self.world)
        mine = rows[self.rank * share : (self.rank + 1) * share]
        filled = mine + rows[: share - len(mine)]
        made = self.predictor.predict([r["input"] for r in filled], [r["choices"] for r in filled])
        return [prediction.label for prediction in made[: len(mine)]]

    def _all_done(self, mine: bool) -> bool:
        """Whether all workers have written their texts. Until then all run passes, in which ZeRO 3 gathers weights."""
        busy = torch.tensor([float(not mine)], device=self.device)
        distributed.all_reduce(busy)
        return not busy.item()

    def _explain(self) -> list[dict[str, str]]:
        """What the student writes as rationales of a few validation rows, if it learns to."""
        if self.run.arm not in TWO_TASKS or self.student.rationales == "per_teacher":
            return []
        inputs = [row["input"] for row in self.validation[:_SHOWN]]
        return [
            {"input": text, "rationale": made}
            for text, made in zip(inputs, self.predictor.explain(inputs), strict=True)
        ]

    def _metrics(self) -> dict[str, Any]:
        """What Ray is told, which compares students by it."""
        state = self.state
        return {
            "step": state.step,
            "score": max(state.best_score, 0.0),
            "tokens_read": state.tokens_read,
            "tokens_written": state.tokens_written,
            "placement_group": get_current_placement_group().id.hex(),  # by which a search frees it
        }

    # what is kept

    def _keep_best(self) -> None:
        """The weights as a Hugging Face directory in the artefact's storage; under ZeRO 3 all workers gather them."""
        sharded = self.student.zero_stage == 3
        with deepspeed.zero.GatheredParameters(list(self.model.parameters())) if sharded else nullcontext():
            if self.rank == 0:
                with tempfile.TemporaryDirectory() as folder:
                    self.predictor.save(folder)
                    to = self.job.artifact.path(f"{BEST}/{self.state.step}")
                    self.job.artifact.fs.put(f"{folder}/", f"{to}/", recursive=True)

    def _checkpoint(self) -> None:
        """Every worker's shard of weights and optimizer, and the state, to go on from."""
        state = self.state
        with tempfile.TemporaryDirectory() as folder:
            self.engine.save_checkpoint(folder, tag=_TAG)
            if self.rank == 0:
                Path(folder, _STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
            ray.train.report(self._metrics(), checkpoint=ray.train.Checkpoint.from_directory(folder))
        if self.rank == 0:  # only now, so that whatever checkpoint is the last finds its best weights
            fs, best = self.job.artifact.fs, self.job.artifact.path(BEST)
            for path in fs.ls(best, detail=False) if fs.exists(best) else []:
                if path.rstrip("/").rpartition("/")[2] != str(state.best_step):
                    fs.rm(path, recursive=True)

    def _engine(self, universal: bool = False) -> Any:
        # None of DeepSpeed's own operators is used, yet it compiles one, which takes g++ and half a minute
        deepspeed.ops.__compatible_ops__ = {}
        engine, _, _, _ = deepspeed.initialize(
            model=self.objective,
            model_parameters=self.model.parameters(),
            config={**self.job.deepspeed, **({"checkpoint": {"load_universal": True}} if universal else {})},
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate),
        )
        return engine

    def _restore(self, folder: str) -> None:
        """Go on from a checkpoint. Another number of workers than wrote it takes other shards.

        Raises:
            UserError: it is of another run, or its shards are cut by another ZeRO stage.
        """
        state = State(**json.loads(Path(folder, _STATE).read_text(encoding="utf-8")))
        if state.key != self.state.key:
            raise UserError(
                f"{self.job.artifact.uri}: the checkpoint in it is of another run ({state.key}); remove the folder, or "
                "train with --force"
            )
        if state.zero_stage != self.state.zero_stage:
            raise UserError(
                f"{self.run.name}: its checkpoint at step {state.step} was written under ZeRO {state.zero_stage}; go "
                f"on with student.zero_stage={state.zero_stage}, or train from the start with --force"
            )
        reshard = state.workers != self.world and state.zero_stage > 0
        self.engine = self._engine(reshard)
        with self._universal(folder) if reshard else nullcontext(folder) as readable:
            self.engine.load_checkpoint(readable, tag=_TAG)
            distributed.barrier()
        state.workers = self.world
        self.state = state
        if self.rank == 0:
            self._say(f"goes on from the checkpoint of step {state.step:,}")

    @contextmanager
    def _universal(self, folder: str) -> Iterator[str]:
        """The checkpoint in DeepSpeed's universal form, which any number of workers can read; made once a node."""
        context = ray.train.get_context()
        node, made = context.get_node_rank(), None
        if context.get_local_rank() == 0:
            made = tempfile.mkdtemp()
            paths = ["--input_folder", f"{folder}/{_TAG}", "--output_folder", f"{made}/{_TAG}"]
            alone = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
            module = "deepspeed.checkpoint.ds_to_universal"
            command = [sys.executable, "-m", module, *paths, *alone, "--inject_missing_state"]
            subprocess.run(command, check=True, capture_output=True)
        gathered: list[Any] = [None] * self.world
        distributed.all_gather_object(gathered, (node, made))
        yield next(path for of, path in gathered if of == node and path)
        if made:
            shutil.rmtree(made)

    def _tracker(self) -> Tracker:
        settings = {**self.run.model_dump(), **self.student.model_dump(mode="json")}
        return Tracker(
            self.job.artifact, self.job.project, self.run.name, settings, self.student.trackers, self.state.step
        )

    def _say(self, text: str) -> None:
        self.job.messages.put_nowait(("line", self.job.artifact.key, f"  {self.run.name}: {text}"))


def _means(losses: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over steps; a part that some steps lack is averaged over those that have it."""
    names = [name for name in dict.fromkeys(name for step in losses for name in step) if name != "step"]
    return {name: sum(s[name] for s in losses if name in s) / sum(name in s for s in losses) for name in names}
