import threading
import time
from contextlib import closing
from typing import Any

import pytest

from pipelines.ray_session import ray_session, tables

pytestmark = pytest.mark.ray

Row = dict[str, Any]


def first_at_once(row: Row) -> Row:
    time.sleep(60 * (row["id"] > 0))
    return row


def test_a_dataset_that_is_left_before_its_end_leaves_no_thread_that_asks_ray() -> None:
    with ray_session():
        import ray

        rows = ray.data.range(20, override_num_blocks=20).map(first_at_once)
        before = set(threading.enumerate())
        with closing(tables(rows)) as blocks:
            assert next(blocks).to_pylist() == [{"id": 0}]
            assert set(threading.enumerate()) > before, "Ray Data works in threads of its own"
        left = set(threading.enumerate()) - before
        assert [thread.name for thread in left if not thread.name.startswith("StreamingExecutor")] == []
    assert not any(thread.is_alive() for thread in left)
