"""A cluster on one machine that grows with its work, and shrinks after it."""

import os
import sys

import pytest

from cluster.local import autoscaling_cluster, cluster_folder, run_and_watch

pytestmark = pytest.mark.ray

WORK = """
import time, ray
ray.init()
ray.get([ray.remote(num_cpus=1)(time.sleep).remote(6) for _ in range(2)])
"""


def test_it_grows_by_the_nodes_that_the_work_needs_and_has_none_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", os.urandom(16).hex())
    with cluster_folder() as folder, autoscaling_cluster(folder) as head:
        code, seen = run_and_watch([sys.executable, "-c", WORK], head)
    assert code == 0
    assert [seen[0].workers, max(at.workers for at in seen), seen[-1].workers] == [0, 2, 0]
