"""What is sent to a cluster, and what is refused before it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from ray.dashboard.modules.job.common import JobStatus
from ray.dashboard.modules.job.pydantic_models import JobType
from ray.job_submission import JobDetails

from cluster.submit import Job, connect, describe, exit_code
from pipelines.cli import OnCluster
from pipelines.errors import UserError

pytestmark = pytest.mark.slow  # it imports Ray

Parsed = Callable[[str], tuple[str, dict[str, Any]]]


def job(stage: str = "rationales", recipe: str = "quickstart", *overrides: str, **resolved: Any) -> Job:
    return Job(stage, recipe, overrides, False, {"name": "mine", "storage": "s3://bucket/runs"} | resolved)


@pytest.mark.parametrize("stage", get_args(OnCluster))
def test_the_cluster_reads_the_command_as_it_was_given(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parsed: Parsed
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my recipes").mkdir()
    (tmp_path / "my recipes" / "a.yaml").touch()
    overrides = ["runs=[{arm: standard, seed: [0, 1]}]", "teacher.model=it's $HOME"]
    read, parameters = parsed(job(stage, str(tmp_path / "my recipes" / "a.yaml"), *overrides).entrypoint())
    assert (read, parameters["recipe"], parameters["set_"]) == (stage, "my recipes/a.yaml", overrides)


def test_force_goes_along(parsed: Parsed) -> None:
    assert parsed(Job("train", "quickstart", (), True, {"storage": "/shared"}).entrypoint())[1]["force"] is True


def test_a_recipe_that_would_not_be_uploaded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "recipe.yaml").touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"\.\./recipe\.yaml: lies outside of .*here, which is uploaded"):
        job("run", "../recipe.yaml").entrypoint()


@pytest.mark.parametrize("storage", ["runs", "./runs", "~/runs"])
def test_storage_that_would_vanish_with_the_job_is_refused(storage: str) -> None:
    with pytest.raises(UserError, match=rf"storage '{storage}': would lie in the job's own folder"):
        job(storage=storage).entrypoint()


def test_a_series_is_of_one_stage_of_one_recipe_with_its_overrides() -> None:
    made = {job(stage, seed=seed).series for stage in ("train", "run") for seed in (0, 1)}
    assert len(made) == 4
    assert job(seed=1).series == job(seed=1).series
    assert job("train").series.startswith("mine-train-")


def ended(code: int | None) -> JobDetails:
    status = JobStatus.SUCCEEDED if code == 0 else JobStatus.FAILED
    return JobDetails(type=JobType.SUBMISSION, status=status, entrypoint="", driver_exit_code=code)


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [(0, 0, "succeeded with exit code 0"), (2, 2, "failed with exit code 2"), (-9, 137, "failed with exit code 137")]
    + [(None, 1, "failed")],
)
def test_a_job_ends_as_its_command_did(given: int | None, code: int, told: str) -> None:
    assert (exit_code(ended(given)), describe(ended(given))) == (code, told)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (None, "give the cluster's dashboard"),
        ("head:8265", "give the dashboard's URL, e.g. http://head:8265"),
        ("http://127.0.0.1:9", "no Ray dashboard answers there"),
    ],
)
def test_an_address_that_is_none_is_refused(
    address: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "any")
    with pytest.raises(UserError, match=sentence):
        connect(address)
