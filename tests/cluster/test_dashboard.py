"""The dashboard's expressions, read by a real Prometheus that has no series yet."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from cluster.dashboard import expressions, look
from cluster.local import free_port


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[str]:
    if not shutil.which("prometheus"):
        pytest.skip("no prometheus here to read PromQL")
    (tmp_path / "prometheus.yml").write_text("scrape_configs: []\n")
    address = f"127.0.0.1:{free_port()}"
    options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", *options, f"--web.listen-address={address}"], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.time() + 30
        while not _ready(f"http://{address}"):
            assert time.time() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def _ready(address: str) -> bool:
    try:
        return requests.get(f"{address}/-/ready", timeout=5).ok
    except requests.ConnectionError:
        return False


def test_prometheus_understands_every_expression(prometheus: str) -> None:
    panels = look(prometheus)
    assert len(panels) == len(list(expressions())) > 15
    assert [(panel.error, panel.series) for panel in panels] == [(None, 0)] * len(panels)
    assert not any("$" in panel.expression for panel in panels)
