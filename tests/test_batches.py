"""Which rows a step learns from."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.batches import Schedule, deal
from pipelines.draw import Rationale, TrainRow


def rows_of(count: int) -> list[TrainRow]:
    """Rows of very different length."""
    return [TrainRow(str(n), "word " * (n * 37 % 101), "label") for n in range(count)]


def seen(schedule: Schedule, steps: int) -> list[str]:
    return [row.row_id for step in range(steps) for row in schedule.step(step)]


@pytest.mark.parametrize("by_length", [False, True])
def test_every_epoch_sees_every_row_once(by_length: bool) -> None:
    ids = seen(Schedule(rows_of(10), 1, batch_size=4, by_length=by_length), steps=10)
    epochs = [ids[at : at + 10] for at in range(0, 40, 10)]
    assert all(Counter(epoch) == Counter(map(str, range(10))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@given(count=st.integers(1, 400), size=st.integers(1, 40), epochs=st.integers(1, 3))
def test_batches_by_length_hold_the_rows_of_the_epoch_whatever_the_sizes(count: int, size: int, epochs: int) -> None:
    schedule = Schedule(rows_of(count), 3, size, by_length=True)
    ids = seen(schedule, steps=-(-count * epochs // size))
    for epoch in range(epochs):
        assert Counter(ids[epoch * count : (epoch + 1) * count]) == Counter(map(str, range(count)))


def test_batches_by_length_hold_rows_of_like_length_in_every_epoch() -> None:
    rows = rows_of(1000)  # no multiple of the batch

    def spread(by_length: bool, step: int) -> int:
        lengths = [len(row.input) for row in Schedule(rows, 0, 16, by_length).step(step)]
        return max(lengths) - min(lengths)

    steps = range(200)  # three epochs
    assert sum(spread(True, s) for s in steps) < 0.25 * sum(spread(False, s) for s in steps)


def test_batches_by_length_come_in_mixed_order() -> None:
    schedule = Schedule(rows_of(1000), 0, 16, by_length=True)
    means = [sum(len(row.input) for row in schedule.step(step)) for step in range(30)]
    assert 5 < sum(a < b for a, b in pairwise(means)) < 25


@pytest.mark.parametrize("by_length", [False, True])
def test_order_depends_on_the_seed_and_the_step_alone(by_length: bool) -> None:
    rows = rows_of(400)
    made = [[r.row_id for r in Schedule(rows, seed, 8, by_length).step(3)] for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    walked = Schedule(rows, 1, 8, by_length)
    assert [[r.row_id for r in walked.step(step)] for step in range(4)][3] == made[0]


TOLD = TrainRow(
    "a", "in", "label", (Rationale("one", "t1"), Rationale("two", "t1"), Rationale("three", "t2"), Rationale("4", "t1"))
)


def taught(schedule: Schedule, step: int) -> tuple[str, ...]:
    return tuple(r.text for r in schedule.step(step)[0].rationales)


def test_the_first_rationale_of_a_row_is_taught_unless_told_otherwise() -> None:
    assert {taught(Schedule([TOLD], 0, 1), step) for step in range(9)} == {("one",)}


def test_one_rationale_is_drawn_anew_each_epoch() -> None:
    schedule = Schedule([TOLD], 0, 1, rationales="draw")
    drawn = [taught(schedule, epoch) for epoch in range(100)]
    assert set(drawn) == {("one",), ("two",), ("three",), ("4",)}
    assert drawn == [taught(Schedule([TOLD], 0, 1, rationales="draw"), epoch) for epoch in range(100)]
    assert taught(Schedule([TrainRow("b", "in", "label")], 0, 1, rationales="draw"), 0) == ()


def test_one_rationale_of_each_teacher() -> None:
    assert taught(Schedule([TOLD], 0, 1, rationales="per_teacher"), 0) == ("one", "three")


@given(parts=st.integers(1, 6), each=st.integers(1, 6))
def test_rows_are_dealt_once_in_equal_parts(parts: int, each: int) -> None:
    rows = rows_of(parts * each)
    dealt = deal(rows, parts)
    assert [len(part) for part in dealt] == [each] * parts
    assert Counter(row.row_id for part in dealt for row in part) == Counter(row.row_id for row in rows)


def test_parts_are_about_as_long() -> None:
    lengths = [sum(len(row.input) for row in part) for part in deal(rows_of(64), 4)]
    assert max(lengths) < 1.05 * min(lengths)
