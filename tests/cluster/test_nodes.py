"""Nodes that die without a word, that do not share the storage, that are for one stage only.

`pytest tests/cluster/test_nodes.py -s` prints what was done twice and how long it took.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.local import Node
from pipelines.dataset import build_dataset
from pipelines.lineage import ROWS, Lineage
from pipelines.pending import keys_on_disk
from pipelines.rationales import build_rationales
from pipelines.recipe import Run, load_recipe
from pipelines.schema import GENERATIONS

pytestmark = pytest.mark.ray

ASKED = 240
BATCH = 16


class Running:
    """`distill STAGE RECIPE --set …` as a process of its own."""

    def __init__(self, log: Path, stage: str, recipe: str, *overrides: str) -> None:
        options = [part for override in overrides for part in ("--set", override)]
        self.log, self.start = log, time.time()
        with log.open("wb") as file:
            self.process = psutil.Popen(
                [sys.executable, "-m", "pipelines", stage, recipe, *options], stdout=file, stderr=subprocess.STDOUT
            )

    def wait_until(self, reached: Callable[[], bool]) -> float:
        """Seconds since the start."""
        while not reached():
            assert self.process.poll() is None, self.log.read_text()
            assert time.time() < self.start + 240, self.log.read_text()
            time.sleep(0.05)
        return time.time() - self.start

    def end(self) -> float:
        """Seconds since the start."""
        assert self.process.wait(timeout=300) == 0, self.log.read_text()
        return time.time() - self.start


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts commands, none of which outlives the test."""
    started: list[Running] = []

    def start(*arguments: str) -> Running:
        started.append(Running(tmp_path / f"log-{len(started)}", *arguments))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def runs(node: Node, actor: str) -> bool:
    return any(actor in " ".join(process.cmdline()) for process in node.process.children(recursive=True))


def told(line: Lineage) -> list[tuple[Any, ...]]:
    columns = ["row_id", "sample", "text", "label"]
    tables = [line.rationales.read_table(name, columns=columns) for name in ("accepted", "rejected")]
    return sorted(tuple(row.values()) for table in tables for row in table.to_pylist())


@pytest.mark.long
@pytest.mark.parametrize("replaced", [False, True])
def test_a_node_with_an_engine_dies(
    replaced: bool, tmp_path: Path, add_node: Callable[[], Node], run: Callable[..., Running]
) -> None:
    nodes = [add_node(), add_node()]

    def overrides(storage: str) -> list[str]:
        return [
            f"storage={tmp_path / storage}",
            f"source.limit={ASKED // 3}",
            f"teacher.batch_size={BATCH}",
            "teacher.replicas=[1, 2]",
        ]

    lines = [Lineage(load_recipe("quickstart", overrides(name))) for name in ("whole", "broken")]
    undisturbed = run("rationales", "quickstart", *overrides("whole")).end()
    broken = run("rationales", "quickstart", *overrides("broken"))
    broken.wait_until(lambda: len(keys_on_disk(lines[1].generations)) >= ASKED // 4)
    victim = next(node for node in nodes if runs(node, "Asker"))
    at = time.time() - broken.start
    victim.kill()
    if replaced:
        add_node()
    took = broken.end()
    assert told(lines[1]) == told(lines[0])
    twice = lines[1].generations.dataset(ROWS, GENERATIONS).count_rows() - ASKED
    print(f"\nrationales, replaced {replaced}: {undisturbed:.0f} s; killed at {at:.0f} s: {took:.0f} s; {twice} twice")
    assert twice <= BATCH


STUDENT = [
    "student={steps: 60, eval_every: 30, checkpoint_every: 5, batch_size: 8, learning_rate: 1.0e-3, precision: fp32, "
    "dropout: 0.1, workers: 2, zero_stage: 2}",
    "source.validation_share=0.2",
    "evaluate.split=validation",
    "search={space: {arm: step_by_step, alpha: [0.25, 0.75]}, stop_early: false}",
]
FIRST, SECOND = (Run(arm="step_by_step", alpha=alpha) for alpha in (0.25, 0.75))


@pytest.mark.parametrize("stage", ["train", pytest.param("search", marks=pytest.mark.long)])
def test_a_node_with_a_worker_of_training_dies(
    stage: str,
    tmp_path: Path,
    project: Path,
    add_node: Callable[[], Node],
    run: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    nodes = [add_node(), add_node()]

    def overrides(storage: str) -> list[str]:
        return [f"storage={tmp_path / storage}", *STUDENT, "runs=[{arm: step_by_step, alpha: 0.25}]"]

    whole, broken = (Lineage(load_recipe("recipe.yaml", overrides(name))) for name in ("whole", "broken"))
    build_rationales(whole)
    build_dataset(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    undisturbed = run(stage, "recipe.yaml", *overrides("whole")).end()
    command = run(stage, "recipe.yaml", *overrides("broken"))
    command.wait_until(lambda: steps(broken, FIRST) >= 20)  # Ray Train hears of checkpoints every two seconds
    reached, at = steps(broken, FIRST), time.time() - command.start
    nodes[0].kill()
    add_node()
    took = command.end()
    print(f"\n{stage}: {undisturbed:.0f} s; killed at {at:.0f} s, step {reached} of a student: {took:.0f} s")
    assert "goes on from the checkpoint of step" in command.log.read_text()
    for student in [FIRST, SECOND] if stage == "search" else [FIRST]:
        losses, expected = (line.student(student).read_table("losses").to_pylist() for line in (broken, whole))
        assert [row["step"] for row in losses] == list(range(1, 61))
        assert losses == expected, "to the last digit"
    if stage == "search":
        columns = ["name", "key", "state", "score", "chosen"]
        trials, expected = (line.search.read_table("trials", columns).to_pylist() for line in (broken, whole))
        assert trials == expected


def steps(line: Lineage, student: Run) -> int:
    """How far its checkpoints have come."""
    reached = [0]
    for state in Path(line.student(student).path("ray")).glob("checkpoint_*/state.json"):
        try:
            reached.append(json.loads(state.read_text())["step"])
        except (FileNotFoundError, ValueError):  # removed, or not yet whole
            continue
    return max(reached)


@pytest.mark.long
def test_stages_keep_to_the_nodes_that_bear_their_labels(
    tmp_path: Path,
    project: Path,
    add_node: Callable[..., Node],
    run: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    teaching, training = (add_node(labels=f"ray-subcluster={role}") for role in ("teacher", "training"))
    storage = f"storage={tmp_path / 'storage'}"
    for_teacher = [
        storage,
        "source.limit=20",
        "teacher.replicas=[1, 2]",
        "teacher.node_labels={ray-subcluster: teacher}",
    ]
    line = Lineage(load_recipe("quickstart", for_teacher))
    asked = run("rationales", "quickstart", *for_teacher)
    asked.wait_until(lambda: len(keys_on_disk(line.generations)) > 0)
    assert (runs(teaching, "Asker"), runs(training, "Asker")) == (True, False)
    asked.end()
    overrides = [storage, *STUDENT, "student.workers=1", "student.node_labels={ray-subcluster: training}"]
    overrides.append("runs=[{arm: step_by_step, alpha: 0.25}]")
    line = Lineage(load_recipe("recipe.yaml", overrides))
    build_rationales(line)
    build_dataset(line)
    trained = run("train", "recipe.yaml", *overrides)
    trained.wait_until(lambda: steps(line, FIRST) > 0)
    assert (runs(teaching, "RayTrainWorker"), runs(training, "RayTrainWorker")) == (False, True)
    trained.end()


@pytest.fixture
def add_blind_node(tmp_path: Path, add_node: Callable[..., Node]) -> Callable[[], Node]:
    """Adds a node for which `storage` is another disk: it lives in a mount namespace of its own."""
    storage = tmp_path / "storage"
    storage.mkdir()
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {storage} && exec "$@"', "sh"]
    if subprocess.run([*hidden, "true"], check=False).returncode:
        pytest.skip("hiding a folder from a node needs a privilege that is not here")
    return lambda: add_node(before=hidden)


def test_a_folder_that_a_node_does_not_share_is_refused(
    tmp_path: Path, add_node: Callable[[], Node], add_blind_node: Callable[[], Node], run: Callable[..., Running]
) -> None:
    add_blind_node()
    add_node()
    add_node().kill()  # and Ray takes a while to find out
    refused = run("rationales", "quickstart", f"storage={tmp_path}/storage", "source.limit=4")
    assert refused.process.wait(timeout=120) == 2, refused.log.read_text()
    assert f"storage {tmp_path}/storage: 1 of 3 nodes do not share this folder" in refused.log.read_text()


def test_a_node_that_comes_later_and_does_not_share_the_folder_ends_the_run(
    tmp_path: Path, add_node: Callable[[], Node], add_blind_node: Callable[[], Node], run: Callable[..., Running]
) -> None:
    overrides = [f"storage={tmp_path}/storage", "source.limit=4", "teacher.replicas=[1, 1]"]
    waiting = run("rationales", "quickstart", *overrides)
    line = Lineage(load_recipe("quickstart", overrides))
    waiting.wait_until(lambda: Path(line.generations.path(".lease")).exists())
    time.sleep(15)  # by then it waits for a CPU
    add_blind_node()
    assert waiting.process.wait(timeout=180) == 2, waiting.log.read_text()
    assert "does not share this folder" in waiting.log.read_text()
