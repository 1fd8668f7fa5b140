"""A search on a real Ray Tune: killed and gone on with, one trial that fails, test read by the chosen alone."""

import time
from contextlib import suppress
from typing import Any

import psutil
import pytest

from pipelines.lineage import Lineage
from pipelines.progress import progress_of
from pipelines.recipe import Run
from pipelines.report import build_report
from pipelines.search import _trial, chosen_runs, search_students

pytestmark = pytest.mark.ray

SPACE = "[{arm: [standard, step_by_step], alpha: [0.1, 0.9]}, {arm: standard, model: 'builtin:quickstart/teacher'}]"
SETTINGS = ("student.steps=12", "student.eval_every=3", "student.checkpoint_every=3", f"search.space={SPACE}")


def workers() -> list[str]:
    """Training workers of this process's own cluster."""
    names = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended since
            names.append(process.name())
    return [name for name in names if "RayTrainWorker" in name]


def test_a_search_is_killed_goes_on_and_chooses_on_validation(place: Any) -> None:
    line: Lineage = place.line(*SETTINGS)
    points = line.recipe.search.points()
    assert len(points) == 4
    process = place.start("search", *SETTINGS)
    deadline = time.time() + 300
    while not any(line.student(run).done() for run in points):
        assert process.poll() is None, place.log.read_text()
        assert time.time() < deadline, place.log.read_text()
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    outlived = place.end(process, family)
    assert not any("Train" in name or "trial" in name or "raylet" in name for name in outlived), outlived
    before = {run: line.student(run).manifest()["finished"] for run in points if line.student(run).done()}
    assert before

    artifact = search_students(line)
    trials = {trial["name"]: trial for trial in artifact.read_table("trials").to_pylist()}
    assert len(trials) == 4
    failed = trials["standard-gold-1-teacher-seed0"]
    assert failed["state"] == "failed"
    assert "must be an encoder-decoder of the T5 family" in failed["error"]
    for run, finished in before.items():
        assert line.student(run).manifest()["finished"] == finished, "no student is trained twice"
    chosen = chosen_runs(line)
    assert sorted(run.arm for run in chosen) == ["standard", "step_by_step"]
    for run in chosen:
        rivals = [t["score"] for t in trials.values() if t["arm"] == run.arm and t["model"] is None]
        assert line.student(run).done()
        assert trials[run.name]["score"] == max(rivals)
    reads = artifact.manifest()["reads_of_test"]
    assert sorted(read["student"] for read in reads) == sorted(run.name for run in chosen)

    trained = {run: line.student(run).manifest()["finished"] for run in chosen}
    search_students(line)
    assert {run: line.student(run).manifest()["finished"] for run in chosen} == trained
    report = build_report(line, chosen=chosen).manifest()
    assert [cell["arm"] for cell in report["table"]] == ["standard", "step_by_step"]


def test_workers_of_a_stopped_trial_end_with_it_and_leave_their_places(
    place: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray
    from ray import tune

    from pipelines.trials import TrialWatch

    free = ray.available_resources()["CPU"]
    line: Lineage = place.line("student.steps=100000", "student.eval_every=2")
    run = Run(arm="standard")
    with progress_of("days", 100_000) as messages:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, line=line, messages=messages), {"CPU": 0.01}),
            param_space={"run": tune.grid_search([run.model_dump()])},
            run_config=tune.RunConfig(
                name="stopped",
                storage_path=str(place.storage),
                stop={"step": 4},
                callbacks=[TrialWatch(2, 100_000)],
                verbose=0,
            ),
        )
        (result,) = tuner.fit()
    assert result.error is None
    assert result.metrics is not None
    assert 4 <= result.metrics["step"] < 100_000
    deadline = time.time() + 20
    while workers() and time.time() < deadline:
        time.sleep(0.2)
    assert not workers()
    assert not line.student(run).done()
    while ray.available_resources()["CPU"] < free and time.time() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == free
    assert "1 of 2 students tried, about" in capsys.readouterr().out
