"""The teacher's stage on real engines: killed, stopped, asked again, on other storage."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.errors import UserError
from pipelines.lineage import ROWS, Lineage
from pipelines.meter import spent
from pipelines.pending import keys_on_disk
from pipelines.plan import make_plan
from pipelines.preview import preview
from pipelines.rationales import build_rationales, retry_rejected
from pipelines.recipe import load_recipe
from pipelines.schema import GENERATIONS
from tests.engines.processes import is_agent

pytestmark = pytest.mark.ray

BATCH = 16
LIMIT = 40
_ENGINE = "MapWorker(MapBatches(Asker))"


def quickstart(storage: Path | str, *overrides: str) -> Lineage:
    small = [f"storage={storage}", f"source.limit={LIMIT}", f"teacher.batch_size={BATCH}", "teacher.replicas=[1, 1]"]
    return Lineage(load_recipe("quickstart", [*small, *overrides]))


def told(line: Lineage) -> list[tuple[Any, ...]]:
    """What the stage came to: every text with what was read from it."""
    columns = ["row_id", "sample", "text", "label"]
    tables = [line.rationales.read_table(name, columns=columns) for name in ("accepted", "rejected")]
    return sorted(tuple(row.values()) for table in tables for row in table.to_pylist())


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    line = quickstart(tmp_path_factory.mktemp("unkilled"))
    build_rationales(line)
    return line


# killed


class Run:
    """`distill rationales` as a process of its own, on a Ray cluster of its own."""

    def __init__(self, storage: Path) -> None:
        self.line = quickstart(storage)
        sets = [f"storage={storage}", f"source.limit={LIMIT}", f"teacher.batch_size={BATCH}", "teacher.replicas=[1, 1]"]
        command = [sys.executable, "-m", "pipelines", "rationales", "quickstart"]
        self.log = storage / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *(part for override in sets for part in ("--set", override))], stdout=log, stderr=log
            )
        self.family: list[psutil.Process] = []

    def wait_for(self, texts: int) -> None:
        """Until so many texts are on disk."""
        deadline = time.time() + 240
        while len(keys_on_disk(self.line.generations)) < texts:
            assert self.process.poll() is None, self.log.read_text()
            assert time.time() < deadline, self.log.read_text()
            time.sleep(0.02)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def kill(self, *names: str) -> None:
        """Kill -9 what of the family bears one of these names."""
        victims = [p for p in self.family if any(name in " ".join(_command(p)) for name in names)]
        assert victims, [_command(p) for p in self.family]
        for victim in victims:
            victim.kill()

    def end(self) -> None:
        """Wait until nothing of it is left; an engine that outlives its driver for half a minute is an orphan."""
        self.process.kill()
        self.process.wait()
        deadline = time.time() + 30
        agents = [p for p in self.family if is_agent(p)]
        while (orphans := [p for p in self.family if p not in agents and _lives(p)]) and time.time() < deadline:
            time.sleep(0.2)
        engines = [orphan for orphan in orphans if _ENGINE in " ".join(_command(orphan))]
        for orphan in [*orphans, *agents]:
            with suppress(psutil.NoSuchProcess):
                orphan.kill()
        assert not engines


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_killed_at_any_moment_it_goes_on_where_it_was(unkilled: Lineage, tmp_path: Path) -> None:
    asked = len(told(unkilled))
    moments = sorted(random.Random(time.time_ns()).sample(range(1, asked - 2 * BATCH), 2))
    run = Run(tmp_path)
    run.wait_for(moments[0])
    run.process.send_signal(signal.SIGKILL)  # the driver
    run.end()
    kept = len(keys_on_disk(run.line.generations))
    run = Run(tmp_path)
    run.wait_for(max(moments[1], kept + 1))
    run.kill("raylet", "gcs_server")  # the cluster
    run.end()
    assert len(keys_on_disk(run.line.generations)) > kept
    run = Run(tmp_path)
    run.wait_for(len(keys_on_disk(run.line.generations)) + 1)
    run.kill(_ENGINE)  # the engine, which Ray starts again
    assert run.process.wait(timeout=300) == 0, run.log.read_text()
    run.end()
    assert told(run.line) == told(unkilled)
    written = run.line.generations.dataset(ROWS, GENERATIONS).count_rows()
    assert written - asked <= BATCH, f"killed at {moments}, {written} texts were written for {asked}"


# all in one process


def test_a_run_that_is_done_is_not_asked_again(unkilled: Lineage, capsys: pytest.CaptureFixture[str]) -> None:
    before = spent(unkilled.generations)
    build_rationales(Lineage(unkilled.recipe), force=True)
    assert spent(unkilled.generations) == before
    assert "done before, skipped" in capsys.readouterr().out


def test_further_rows_are_added_to_what_is_there(unkilled: Lineage) -> None:
    before = spent(unkilled.generations)["rows"]
    root = Path(unkilled.recipe.storage)
    line = quickstart(root, f"source.limit={LIMIT + 4}", "teacher.splits=[train]")
    build_rationales(line)
    assert line.generations == unkilled.generations
    assert spent(line.generations)["rows"] - before == 4
    assert sum(line.rationales.manifest()["funnel"]["train"].values()) == LIMIT + 4


def test_two_replicas_are_used_where_there_is_work_for_two(tmp_path: Path) -> None:
    line = quickstart(tmp_path, "source.limit=200", "teacher.replicas=[1, 2]", "teacher.splits=[train, unlabelled]")
    build_rationales(line)
    accounts = [json.loads(path.read_text()) for path in Path(line.generations.path("spent")).iterdir()]
    assert [account["replicas"] for account in accounts] == [2]


def test_budgets_stop_a_run_that_goes_on_when_they_are_raised(unkilled: Lineage, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"budget\.max_rows is reached at 30 texts"):
        build_rationales(quickstart(tmp_path, "budget.max_rows=30"))
    assert len(keys_on_disk(quickstart(tmp_path).generations)) == 30
    line = quickstart(tmp_path, "budget.max_tokens=100000000", "budget.max_rows=10000")
    build_rationales(line)
    assert spent(line.generations)["rows"] == 3 * LIMIT
    assert told(line) == told(unkilled)


def test_samples_vote_and_rejected_ones_are_tried_again(tmp_path: Path) -> None:
    sampled = ["teacher.temperature=0.9", "teacher.samples=3", "teacher.splits=[unlabelled]"]
    line = quickstart(tmp_path, *sampled, "teacher.max_tokens=48", "source.limit=24")
    build_rationales(line)
    funnel = line.rationales.manifest()["funnel"]["unlabelled"]
    assert sum(funnel.values()) == 72
    assert funnel["truncated"] > 0, "some texts are longer than 48 tokens"
    shares = line.rationales.read_table("accepted")["agreement"].to_pylist()
    assert {round(share, 2) for share in shares} <= {1.0, 0.5, 0.33, 0.67}
    again = retry_rejected(line, ["truncated"])
    assert again.rationales != line.rationales
    assert len(keys_on_disk(again.retries[0])) == funnel["truncated"]
    build_rationales(again)
    assert sum(again.rationales.manifest()["funnel"]["unlabelled"].values()) == 72
    assert Lineage(line.recipe).rationales == again.rationales, "the next command knows of the retry"
    spent_up = Lineage(
        again.recipe.model_copy(update={"teacher": again.recipe.teacher.model_copy(update={"max_retries": 1})})
    )
    with pytest.raises(UserError, match="tried again 1 times already"):
        retry_rejected(spent_up, ["truncated"])
    with pytest.raises(UserError, match="--retry-rejected bored: give one or more of engine_error"):
        retry_rejected(line, ["bored"])


def test_rows_that_it_got_wrong_are_asked_again_with_gold_told(unkilled: Lineage) -> None:
    line = quickstart(unkilled.recipe.storage, "curate.on_disagree=rationalize")
    wrong = unkilled.rationales.manifest()["funnel"]["train"]["disagrees_with_gold"]
    build_rationales(line)
    assert len(keys_on_disk(line.hinted)) == wrong
    assert sum(line.rationales.manifest()["funnel"]["train"].values()) == LIMIT + wrong
    told_gold = [r for n in ("accepted", "rejected") for r in line.rationales.iter_rows(n) if r["rationalized"]]
    assert len(told_gold) == wrong
    gold = {row["row_id"]: row["label"] for row in line.examples.iter_rows("train")}
    assert all(
        row["label"] == gold[row["row_id"]] for row in line.rationales.iter_rows("accepted") if row["split"] == "train"
    )


def test_a_plan_says_what_it_will_take_and_keeps_what_it_generates(tmp_path: Path) -> None:
    line = quickstart(tmp_path, "source.limit=100", "teacher.batch_size=32", "teacher.price.replica_hour=2")
    plan = make_plan(line)
    assert plan["rows"] == 300 - 64
    assert plan["cached_share"] > 0.5
    build_rationales(line)
    paid = spent(line.generations)
    assert paid["rows"] == 300
    for name in ("input_tokens", "output_tokens"):
        assert plan[name]["value"] == pytest.approx(paid[name] - plan["sample"][name], rel=0.2)
    assert make_plan(line)["rows"] == 0


def test_a_preview_shows_prompt_text_and_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = quickstart(tmp_path)
    made = preview(line, 3)
    assert len(made) == len(keys_on_disk(line.generations)) == 3
    shown = capsys.readouterr().out
    assert "Decide each return by the policy" in shown
    assert all((row["reason"] or f"accepted: {row['label']}") in shown for row in made)


def test_what_happens_stands_at_rays_prometheus_endpoint(unkilled: Lineage) -> None:
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    address = f"http://{ray.nodes()[0]['NodeManagerAddress']}:{port}/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.time() + 60
    while "distill_rows" not in (page := opener.open(address).read().decode()) and time.time() < deadline:
        time.sleep(1)
    assert 'outcome="accepted"' in page
    assert "distill_tokens" in page


# other storage


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a real S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": host,
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket/runs"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_on_object_storage_a_run_stops_and_goes_on(unkilled: Lineage, bucket: str) -> None:
    def run(*sets: str) -> subprocess.CompletedProcess[str]:
        """On a cluster of its own, which has the bucket's address."""
        given = [
            f"storage={bucket}",
            f"source.limit={LIMIT}",
            f"teacher.batch_size={BATCH}",
            "teacher.replicas=[1, 1]",
            *sets,
        ]
        options = [part for override in given for part in ("--set", override)]
        command = [sys.executable, "-m", "pipelines", "rationales", "quickstart", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    stopped = run("budget.max_rows=30")
    assert (stopped.returncode, "budget.max_rows is reached at 30 texts" in stopped.stderr) == (2, True), stopped.stderr
    line = quickstart(bucket)
    assert len(keys_on_disk(line.generations)) == 30
    with line.generations.lease():
        refused = run()
    assert (refused.returncode, "another run is at work on it" in refused.stderr) == (2, True), refused.stderr
    assert run().returncode == 0
    assert spent(line.generations)["rows"] == 3 * LIMIT
    assert told(line) == told(unkilled)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for half a run."""
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "disk", tmp_path]).returncode:
        pytest.skip("mounting a small disk needs a privilege that is not here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(unkilled: Lineage, small_disk: Path) -> None:
    line = quickstart(small_disk)
    filler = small_disk / "filler"

    def fill() -> None:
        while len(keys_on_disk(line.generations)) < BATCH:
            time.sleep(0.02)
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1024))
            except OSError:
                pass

    thread = threading.Thread(target=fill)
    thread.start()
    with pytest.raises(UserError, match="no space left"):
        build_rationales(line)
    thread.join()
    filler.unlink()
    build_rationales(quickstart(small_disk))
    assert told(line) == told(unkilled)
