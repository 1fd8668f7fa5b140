"""A search on a real Ray Tune: killed and gone on with, one trial that fails, test read by the chosen alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.lineage import Lineage
from pipelines.recipe import load_recipe
from pipelines.report import build_report
from pipelines.search import chosen_runs, search_students

pytestmark = pytest.mark.ray

SPACE = (
    "[{arm: [standard, step_by_step], alpha: [0.1, 0.9], fraction: 0.5},"
    " {arm: standard, model: 'builtin:quickstart/teacher'}]"
)
SETTINGS = (
    "source.limit=64",
    "teacher.splits=[train]",
    "teacher.replicas=[1, 1]",
    "student.steps=12",
    "student.eval_every=3",
    "student.checkpoint_every=3",
    f"search.space={SPACE}",
)


def line_in(storage: Path) -> Lineage:
    return Lineage(load_recipe("quickstart", [f"storage={storage}", *SETTINGS]))


def command(storage: Path, name: str) -> subprocess.Popen[bytes]:
    sets = [f"storage={storage}", *SETTINGS]
    arguments = [sys.executable, "-m", "pipelines", name, "quickstart"]
    with (storage / "log").open("ab") as log:
        return subprocess.Popen(
            [*arguments, *(part for override in sets for part in ("--set", override))],
            stdout=log,
            stderr=log,
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        )


def test_a_search_is_killed_goes_on_and_chooses_on_validation(tmp_path: Path) -> None:
    line = line_in(tmp_path)
    for name in ("rationales", "dataset"):
        assert command(tmp_path, name).wait(timeout=240) == 0, (tmp_path / "log").read_text()
    process = command(tmp_path, "search")
    points = line.recipe.search.points()
    assert len(points) == 4
    deadline = time.time() + 300
    while not any(line.student(run).done() for run in points):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.time() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    names = [orphan.name() for orphan in alive]
    for orphan in alive:  # agents of Ray's own may
        orphan.kill()
    assert not any("Train" in name or "trial" in name or "raylet" in name for name in names), names
    before = {run: line.student(run).manifest()["finished"] for run in points if line.student(run).done()}
    assert before

    artifact = search_students(line)
    trials = {trial["name"]: trial for trial in artifact.read_table("trials").to_pylist()}
    assert len(trials) == 4
    assert trials["standard-gold-1-teacher-seed0"]["state"] == "failed"
    assert "must be an encoder-decoder of the T5 family" in trials["standard-gold-1-teacher-seed0"]["error"]
    for run, finished in before.items():
        assert line.student(run).manifest()["finished"] == finished, "no student is trained twice"
    chosen = chosen_runs(line)
    assert sorted((run.arm, run.fraction) for run in chosen) == [
        ("standard", 0.5),
        ("step_by_step", 0.5),
    ]
    for run in chosen:
        beaten = [t for t in trials.values() if (t["arm"], t["fraction"]) == (run.arm, run.fraction) and t["accuracy"]]
        assert line.student(run).done()
        assert trials[run.name]["accuracy"] == max(t["accuracy"] for t in beaten if t["model"] is None)
    reads = artifact.manifest()["reads_of_test"]
    assert sorted(read["student"] for read in reads) == sorted(run.name for run in chosen)

    trained = {run: line.student(run).manifest()["finished"] for run in chosen}
    search_students(line)
    assert {run: line.student(run).manifest()["finished"] for run in chosen} == trained
    report = build_report(line, runs=chosen).manifest()
    assert {cell["fraction"] for cell in report["table"]} == {0.5}
