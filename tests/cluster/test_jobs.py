"""Jobs on a real Ray head that has no CPU to lend and wants a token."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import Node, cluster_folder, free_port

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """The environment of a client: where the head's dashboard is, and its token."""
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(16).hex(), "NO_PROXY": "127.0.0.1,localhost"}
    port = free_port()
    with (
        cluster_folder() as folder,
        Node(folder, environment=environment, include_dashboard="true", dashboard_port=port) as node,
    ):
        node.wait()
        yield os.environ | environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}", "FOLDER": str(folder)}


def distill(head: dict[str, str], project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.run(command, cwd=project, env=head, capture_output=True, text=True, timeout=180)


def job_id(ran: subprocess.CompletedProcess[str]) -> str:
    found = re.search(r"^job (\S+): ", ran.stdout, re.MULTILINE)
    assert found, ran.stdout + ran.stderr
    return found[1]


def test_a_stage_is_sent_followed_to_its_end_and_sent_again_it_does_nothing(
    head: dict[str, str], project: Path, tmp_path: Path
) -> None:
    first = distill(head, project, "submit", "rationales", "recipe.yaml")
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.search(r"accepted\D+40", first.stdout), first.stdout
    assert "Traceback" not in first.stderr
    manifests = list((tmp_path / "storage").glob("*/rationales/*/manifest.json"))
    assert len(manifests) == 1
    assert json.loads(manifests[0].read_text())["funnel"] == {"train": {"accepted": 40}}
    uploaded = [path.parent for path in Path(head["FOLDER"]).rglob("working_dir_files/*/recipe.yaml")]
    assert uploaded
    assert {path.name for path in uploaded[0].iterdir()} == {"recipe.yaml", "rows.jsonl", "task.yaml", "texts.json"}
    written = manifests[0].stat().st_mtime_ns
    again = distill(head, project, "submit", "rationales", "recipe.yaml", "--json")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "done before, skipped" in again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == {"job": f"{job_id(first)[:-1]}2", "exit_code": 0}
    assert manifests[0].stat().st_mtime_ns == written


def test_a_job_that_fails_gives_its_sentence_and_its_exit_code(head: dict[str, str], project: Path) -> None:
    failed = distill(head, project, "submit", "rationales", "recipe.yaml", "--set", "source.train=absent.jsonl")
    assert failed.returncode == 2
    assert "distill: absent.jsonl: no such file" in failed.stdout
    assert "failed with exit code 2" in failed.stdout
    status = distill(head, project, "job", "status", job_id(failed), "--json")
    assert json.loads(status.stdout) == {"job": job_id(failed), "status": "FAILED", "exit_code": 2}
    assert distill(head, project, "job", "logs", job_id(failed), "--follow").returncode == 2


def test_a_job_under_way_is_joined_and_one_that_was_stopped_is_followed_by_the_next(
    head: dict[str, str], project: Path, tmp_path: Path
) -> None:
    waiting = ["submit", "rationales", "quickstart", "--set", f"storage={tmp_path}", "--detach"]  # for a CPU
    began, joined = distill(head, project, *waiting), distill(head, project, *waiting)
    assert f"job {job_id(began)}: submitted" in began.stdout
    assert f"job {job_id(began)}: under way already, joined" in joined.stdout
    assert "is being stopped" in distill(head, project, "job", "stop", job_id(began)).stdout
    followed = distill(head, project, "job", "logs", job_id(began), "--follow")
    assert followed.returncode not in (0, 2), followed.stdout
    assert "stopped" in distill(head, project, "job", "status", job_id(began)).stdout
    assert "has ended already" in distill(head, project, "job", "stop", job_id(began)).stdout
    following = distill(head, project, *waiting)
    assert job_id(following) == f"{job_id(began)[:-1]}2"
    assert f"submitted, after {job_id(began)} stopped" in following.stdout
    distill(head, project, "job", "stop", job_id(following))


@pytest.mark.parametrize(
    ("token", "arguments", "sentence"),
    [
        ("another", ["job", "status", "any"], "refused without the cluster's token"),
        ("", ["job", "status", "any"], "refused without the cluster's token"),
        (None, ["job", "status", "any"], "job any: the cluster knows of none with this id"),
        (None, ["submit", "run", "recipe.yaml", "--set", "storage=runs"], "storage 'runs': would lie in the job's own"),
        (None, ["submit", "run", "recipe.yaml", "--set", "task=absent.yaml"], "absent.yaml"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(
    head: dict[str, str], project: Path, token: str | None, arguments: list[str], sentence: str
) -> None:
    environment = head if token is None else head | {"RAY_AUTH_TOKEN": token, "HOME": str(project)}
    refused = distill(environment, project, *arguments)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert sentence in refused.stderr
