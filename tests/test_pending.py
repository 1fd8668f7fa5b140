"""What a pass over the teacher still wants, and in which tasks it asks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import pending as module
from pipelines.examples import build_examples
from pipelines.lineage import ROWS, Lineage
from pipelines.pending import Asking, keys_of, keys_on_disk, make_keys, tasks
from pipelines.schema import GENERATIONS

MakeLine = Callable[..., Lineage]


def asking(line: Lineage, **keys: Any) -> Asking:
    return Asking(line.generations, line.recipe.teacher, keys.pop("samples", range(1)), **keys)


def write(line: Lineage, name: str, pairs: list[tuple[str, int]]) -> None:
    rows = [dict.fromkeys(GENERATIONS.names) | {"row_id": row_id, "sample": sample} for row_id, sample in pairs]
    line.generations.write_part(f"{ROWS}/{name}", pa.Table.from_pylist(rows, schema=GENERATIONS))


def pending(line: Lineage, **keys: Any) -> list[str]:
    found = module.pending(line, asking(line, **keys), keys_on_disk(line.generations))
    rows = [row for _, texts in found for row in texts.to_pylist()]
    return sorted(f"{row['row_id']}/{row['sample']}" for row in rows)


@pytest.fixture
def line(make_line: MakeLine) -> Lineage:
    made = make_line("teacher.temperature=0.5")
    build_examples(made)
    return made


def test_all_is_pending_at_first(line: Lineage) -> None:
    assert len(pending(line)) == 8 + 3 + 4, "train, test and unlabelled"
    assert len(pending(line, samples=range(3))) == 3 * 15
    assert len(set(pending(line, samples=range(3)))) == 3 * 15


def test_what_is_on_disk_is_not_asked_again(line: Lineage) -> None:
    rows = line.examples.read_table("train")["row_id"].to_pylist()
    write(line, "a", [(rows[0], 0), (rows[1], 0), ("of another source", 0)])
    write(line, "b", [(rows[0], 0), (rows[2], 1)])
    assert len(keys_on_disk(line.generations)) == 4, "a text that was written twice counts once"
    left = pending(line)
    assert len(left) == 13
    assert not {f"{rows[0]}/0", f"{rows[1]}/0"} & set(left)
    assert len(pending(line, samples=range(2))) == 30 - 3


def test_a_pass_may_want_a_few_only(line: Lineage) -> None:
    rows = line.examples.read_table("test")["row_id"].to_pylist()
    write(line, "a", [(rows[0], 0)])
    only = make_keys([(rows[0], 0), (rows[1], 0), ("unknown", 0)])
    assert pending(line, only=only) == [f"{rows[1]}/0"]
    assert pending(line, only=make_keys([])) == []


def test_a_part_half_written_is_no_part(line: Lineage) -> None:
    write(line, "a", [("r", 0)])
    folder = line.generations.path(ROWS)
    with open(f"{folder}/.b.abc", "wb") as file:
        file.write(b"PAR1 torn")
    assert keys_on_disk(line.generations).tolist() == [b"r/0"]


def test_keys_are_sorted_and_single() -> None:
    assert make_keys([("b", 1), ("a", 10), ("b", 1)]).tolist() == [b"a/10", b"b/1"]
    assert np.issubdtype(make_keys([]).dtype, np.bytes_)


def asked(line: Lineage, limit: int = 100, **keys: Any) -> list[list[str]]:
    """The keys of each task."""
    found: list[list[str]] = []
    for task in tasks(line, asking(line, **keys), keys_on_disk(line.generations), limit):
        found.append([])
        for batch in task["batches"]:
            rows, samples = (np.frombuffer(batch[name], np.int32) for name in ("rows", "samples"))
            part = pq.read_table(batch["part"], columns=["row_id"]).take(rows)
            found[-1] += [key.decode() for key in keys_of(part.append_column("sample", pa.array(samples)))]
    return found


def test_each_batch_is_a_task(make_line: MakeLine) -> None:
    line = make_line("teacher.batch_size=12", "teacher.temperature=0.5")
    build_examples(line)
    assert [len(task) for task in asked(line)] == [3, 3, 2, 3, 3, 1], "three splits"
    assert [len(task) for task in asked(line, limit=4)] == [3, 1]
    assert sorted(key for task in asked(line) for key in task) == pending(line)


def test_of_very_many_batches_some_are_a_task(make_line: MakeLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EQUAL", 2)
    monkeypatch.setattr(module, "_BATCHES", 4)
    line = make_line("teacher.batch_size=4", "teacher.temperature=0.5")
    build_examples(line)
    assert [len(task) for task in asked(line, samples=range(2))] == [1, 1, 2, 2, 4, 4, 4, 4, 4, 4]
    assert sorted(key for task in asked(line, samples=range(2)) for key in task) == pending(line, samples=range(2))


def test_a_hundred_million_texts_are_some_ten_thousand_tasks(
    make_line: MakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = make_line()
    batch = {"part": "", "rows": b"", "samples": b""}
    monkeypatch.setattr(module, "_batches", lambda *_: iter([batch] * (100_000_000 // 64)))
    count = sum(1 for _ in tasks(line, asking(line), make_keys([]), 100_000_000))
    assert 10_000 < count < 60_000
