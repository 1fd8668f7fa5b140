"""Ray Train and DeepSpeed with one and two workers, from texts that are given: exact, killed, refused."""

import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event
from transformers import AutoModelForSeq2SeqLM

from pipelines.batches import Schedule
from pipelines.draw import draw_rows
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.predictor import Predictor
from pipelines.recipe import Run, resolve
from pipelines.student import Collator, Objective, load_student
from pipelines.train import train_students

pytestmark = pytest.mark.ray

Place = Any  # of conftest.py
STEPS = 20  # of its recipe
BOTH = Run(arm="step_by_step")


def train(place: Place, *overrides: str) -> Lineage:
    line: Lineage = place.line(*overrides)
    train_students(line, line.recipe.students())
    return line


def losses(line: Lineage, run: Run = BOTH) -> list[dict[str, float]]:
    made: list[dict[str, float]] = line.student(run).read_table("losses").to_pylist()
    return made


def student(line: Lineage) -> Any:
    return line.student(line.recipe.students()[0])


# exact


def plain_losses(line: Lineage, steps: int) -> list[float]:
    """The losses of one plain process, without Ray and DeepSpeed."""
    settings = line.recipe.student
    model, tokenizer = load_student(resolve(settings.model), dropout=0.0)
    schedule = Schedule(draw_rows(line.dataset.iter_rows("train"), BOTH), BOTH.seed, settings.batch_size)
    collate = Collator(model, tokenizer, "step_by_step", settings.max_input_tokens, settings.max_target_tokens)
    objective = Objective(model.train(), settings.alpha)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.0)
    made = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (steps - step) / steps
        loss, _ = objective(collate(schedule.step(step)))
        made.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return made


@pytest.fixture(scope="module")
def plain(days: Callable[[Path], Place], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return plain_losses(days(tmp_path_factory.mktemp("plain")).line(), STEPS)


@pytest.mark.parametrize(("zero", "workers", "accumulation"), [(0, 1, 2), (1, 2, 2), (2, 2, 1), (3, 2, 2)])
def test_shards_workers_and_accumulation_change_no_loss(
    place: Place, plain: list[float], zero: int, workers: int, accumulation: int
) -> None:
    line = train(
        place,
        f"student.zero_stage={zero}",
        f"student.workers={workers}",
        f"student.gradient_accumulation={accumulation}",
    )
    assert [row["loss"] for row in losses(line)] == pytest.approx(plain, rel=2e-3)
    assert losses(line)[0]["loss"] == pytest.approx(plain[0], rel=1e-5)
    made = student(line)
    assert not made.fs.exists(made.path("ray")), "a finished run needs no checkpoints"
    opened = AutoModelForSeq2SeqLM.from_pretrained(made.path("model"))
    assert sum(p.numel() for p in opened.parameters()) == made.manifest()["parameters"]
    predictions = Predictor.open(made.path("model")).predict([f"{row['day']} Yes." for row in place.days])
    right = sum(p.label == row["label"] for p, row in zip(predictions, place.days, strict=True))
    assert right / len(place.days) == pytest.approx(made.manifest()["best"]["accuracy"])


def test_under_zero_3_workers_that_write_texts_of_different_lengths_look_at_validation_together(place: Place) -> None:
    settings = ("student.zero_stage=3", "student.workers=2", "student.eval_every=10", "student.max_target_tokens=32")
    line = train(place, *settings, "runs=[{arm: rationale_first}]")
    assert [look["step"] for look in student(line).manifest()["history"]] == [10, 20]


# killed


SLOW: tuple[str, ...] = (
    "student.steps=80",
    "student.eval_every=40",
    "student.checkpoint_every=5",
    "student.dropout=0.1",
)
SLOW += ("student.workers=2", "student.zero_stage=2", "student.batch_by_length=true")


class Killable:
    """`distill train` as a process of its own."""

    def __init__(self, place: Place, *overrides: str) -> None:
        self.place, self.line, self.log = place, place.line(*overrides), place.log
        self.process = place.start("train", *overrides)
        self.family: list[psutil.Process] = []
        self.begun = self.reached()

    def wait_for(self, steps: int) -> None:
        """Until a checkpoint is there that is so many steps beyond where it began."""
        deadline = time.time() + 240
        while self.reached() < self.begun + steps:
            assert self.process.poll() is None, self.log.read_text()
            assert time.time() < deadline, self.log.read_text()
            time.sleep(0.02)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def reached(self) -> int:
        states = Path(student(self.line).path("ray")).glob("checkpoint_*/state.json")
        steps = [0]
        for state in states:
            try:
                steps.append(json.loads(state.read_text())["step"])
            except (FileNotFoundError, ValueError):  # removed, or not yet whole
                continue
        return max(steps)

    def kill(self, name: str) -> None:
        victims = [p for p in self.family if p.is_running() and name in " ".join([p.name(), *p.cmdline()])]
        assert victims, [p.cmdline() for p in self.family if p.is_running()]
        victims[0].kill()

    def end(self) -> int:
        self.place.end(self.process, self.family)
        return int(self.process.returncode)


@pytest.fixture
def running(place: Place) -> Iterator[list[Killable]]:
    """The runs that a test starts, none of which outlives it."""
    runs: list[Killable] = []
    yield runs
    for run in runs:
        if run.process.poll() is None:
            run.family = psutil.Process(run.process.pid).children(recursive=True)
            run.process.kill()
        run.end()


def test_killed_at_any_moment_it_takes_the_very_steps_of_an_unkilled_run(
    place: Place, days: Callable[[Path], Place], tmp_path: Path, running: list[Killable]
) -> None:
    def start() -> Killable:
        running.append(Killable(place, *SLOW))
        return running[-1]

    run = start()
    run.wait_for(15)  # by then Ray knows of a checkpoint
    run.kill("RayTrainWorker")  # Ray starts all workers again
    run.wait_for(40)
    run.process.kill()  # the driver
    run.end()
    assert run.reached() < 80
    run = start()
    assert run.end() == 0, run.log.read_text()
    assert run.log.read_text().count("goes on from the checkpoint of step") == 2
    unkilled = train(days(tmp_path / "unkilled"), *SLOW)
    assert [row["step"] for row in losses(run.line)] == list(range(1, 81))
    assert losses(run.line) == losses(unkilled), "to the last digit"
    assert student(run.line).manifest()["best"] == student(unkilled).manifest()["best"]
    weights = [AutoModelForSeq2SeqLM.from_pretrained(student(li).path("model")) for li in (run.line, unkilled)]
    for mine, theirs in zip(*(model.parameters() for model in weights), strict=True):
        assert torch.equal(mine, theirs)


def test_another_number_of_workers_goes_on_with_the_same_losses(place: Place, running: list[Killable]) -> None:
    settings = ("student.steps=60", "student.checkpoint_every=5", "student.zero_stage=2")
    running.append(Killable(place, *settings, "student.workers=2"))
    running[0].wait_for(15)
    running[0].kill("raylet")  # the node
    assert running[0].end() != 0
    assert running[0].reached() < 60
    with pytest.raises(UserError, match=r"written under ZeRO 2; go on with student\.zero_stage=2"):
        train(place, *settings, "student.zero_stage=1")
    other = (*settings, "student.alpha=0.1")
    shutil.copytree(student(place.line(*settings)).path("ray"), student(place.line(*other)).path("ray"))
    with pytest.raises(UserError, match="the checkpoint in it is of another run"):
        train(place, *other)
    line = train(place, *settings, "student.workers=1")
    made = [row["loss"] for row in losses(line)]
    assert made == pytest.approx(plain_losses(line, 60), rel=1e-2, abs=1e-3)
    assert student(line).manifest()["recipe"]["student"]["workers"] == 1


# seen


def board(folder: str, name: str) -> list[float]:
    """The values of one scalar in TensorBoard's files, in the order of their steps."""
    made = {}
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:  # TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", content)
            event = Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                if value.tag == name:
                    made[event.step] = value.simple_value
            content = content[16 + length :]
    return [made[step] for step in sorted(made)]


def test_trackers_are_told_and_patience_ends_a_run(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate is next to nothing, so no second look is better than the first."""
    import ray

    uri = f"file://{tmp_path}/mlruns"
    told = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_FILE_STORE": "true"}
    told |= {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    ray.shutdown()  # workers have the environment of the session that they are started in
    line = train(
        place,
        "student.learning_rate=1e-12",
        "student.eval_every=2",
        "student.patience=2",
        "student.metric=macro_f1",
        "student.precision=bf16",
        "student.trackers=[mlflow,wandb]",
    )
    manifest = student(line).manifest()
    assert (manifest["steps"], manifest["stopped_early"], manifest["best"]["step"]) == (6, True, 2)
    first = manifest["history"][0]
    assert manifest["best"] == {"step": 2, "score": first["macro_f1"], "accuracy": first["accuracy"]}
    assert board(student(line).path("tensorboard"), "validation_macro_f1") == pytest.approx([first["macro_f1"]] * 3)
    explained = manifest["history"][-1]["explained"]
    assert [e["input"] for e in explained] == [f"{row['day']} Yes." for row in place.days[:3]]
    import mlflow

    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("days").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [m.value for m in sorted(history, key=lambda m: m.step)] == pytest.approx([r["loss"] for r in losses(line)])
    assert run.data.params["learning_rate"] == "1e-12"
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert board(student(line).path("tensorboard"), "loss") == pytest.approx([r["loss"] for r in losses(line)])


# refused


def test_a_loss_that_is_no_number_ends_the_run_with_the_step_and_its_rows(place: Place) -> None:
    with pytest.raises(
        UserError, match=r"step_by_step-gold-1-seed0: at step 2 the loss is no number, on rows \w{24}, "
    ):
        train(place, "student.learning_rate=3e38")


def test_what_can_be_trained_is_trained_before_the_rest_is_refused(place: Place) -> None:
    runs = "runs=[{arm: standard}, {arm: standard, fraction: 0.1}]"
    with pytest.raises(UserError, match=r"fraction 0\.1 leaves 3 rows, fewer than student\.batch_size 8"):
        train(place, runs, "student.steps=2", "student.eval_every=2")
    line = place.line(runs, "student.steps=2", "student.eval_every=2")
    assert [line.student(run).done() for run in line.recipe.students()] == [True, False]
