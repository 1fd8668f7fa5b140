import json
import random
import re
from collections import Counter
from collections.abc import Iterable

import pytest

from pipelines.quickstart.returns_desk import (
    DATA,
    DAYS,
    FRAMES,
    LABELS,
    SPLITS,
    TEACHER_FRAMES,
    TEST_FRAMES,
    Case,
    Frames,
    decide,
    draw_case,
    explain,
    split,
    write_message,
)
from pipelines.tasks import load_task

Row = dict[str, str]
LABELLED = ("train", "validation", "test")


@pytest.fixture(scope="module")
def data() -> dict[str, list[Row]]:
    """The files as they lie in the project."""
    return {name: [json.loads(line) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")] for name in SPLITS}


def sentences(frames: Frames) -> list[str]:
    reasons = (sentence for group in frames.reasons.values() for sentence in group)
    return [*reasons, *frames.times, *(sentence for group in frames.receipts.values() for sentence in group)]


def frame_pattern(frames: Iterable[str]) -> re.Pattern[str]:
    """Finds a sentence of one of the frames, whole."""
    shapes = (re.escape(f).replace(r"\{item\}", r"\w+").replace(r"\{time\}", r"[\w -]+") for f in frames)
    return re.compile(rf"(?:^|(?<=[.?] ))(?:{'|'.join(shapes)})(?= |$)")


# the data


@pytest.mark.parametrize("name", SPLITS)
def test_the_files_are_what_the_generator_makes(data: dict[str, list[Row]], name: str) -> None:
    assert split(name) == data[name]


@pytest.mark.parametrize("name", LABELLED)
def test_each_label_has_its_share(data: dict[str, list[Row]], name: str) -> None:
    counts = Counter(row["decision"] for row in data[name])
    assert counts.keys() == set(LABELS)
    assert all(0.15 <= count / len(data[name]) <= 0.35 for count in counts.values())


def test_the_pool_has_no_labels_and_is_larger_than_train(data: dict[str, list[Row]]) -> None:
    assert {tuple(row) for row in data["unlabelled"]} == {("message",)}
    assert len(data["unlabelled"]) > len(data["train"])


def test_no_message_stands_twice(data: dict[str, list[Row]]) -> None:
    task = load_task("returns_desk")
    ids = [task.row_id(task.render(row)) for rows in data.values() for row in rows]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("unit", DAYS)
def test_times_are_told_in_digits_and_in_words(data: dict[str, list[Row]], name: str, unit: str) -> None:
    texts = " ".join(row["message"] for row in data[name])
    assert len(re.findall(rf"\b\d+ {unit}s?\b", texts)) > 20
    assert len(re.findall(rf"\b(?:a|[a-z]+ty|[a-z]+teen|one|two|three|four|five) {unit}s?\b", texts)) > 10


# the frames


def test_there_are_thirty_frames_and_more() -> None:
    assert len(sentences(FRAMES)) >= 30
    assert len(sentences(TEST_FRAMES)) >= 10
    assert all(len(group) >= 3 for group in TEST_FRAMES.reasons.values())


def test_sets_of_frames_do_not_overlap() -> None:
    assert set(sentences(TEST_FRAMES)).isdisjoint(sentences(FRAMES))
    assert set(sentences(TEACHER_FRAMES)) < set(sentences(FRAMES))
    assert len(set(sentences(FRAMES))) == len(sentences(FRAMES))


@pytest.mark.parametrize("name", ["train", "validation", "unlabelled"])
def test_frames_of_test_stand_nowhere_else(data: dict[str, list[Row]], name: str) -> None:
    held_out = frame_pattern(sentences(TEST_FRAMES))
    assert [row["message"] for row in data[name] if held_out.search(row["message"])] == []


def test_every_test_message_has_a_frame_of_its_own(data: dict[str, list[Row]]) -> None:
    held_out = frame_pattern(sentences(TEST_FRAMES))
    assert [row["message"] for row in data["test"] if not held_out.search(row["message"])] == []


@pytest.mark.parametrize("frames", [FRAMES, TEST_FRAMES])
def test_every_case_can_be_told_in_every_set_of_frames(frames: Frames) -> None:
    rng = random.Random(0)
    for _ in range(200):
        case = draw_case(rng)
        message = write_message(case, rng, frames)
        assert case.item in message
        assert not set("{}_") & set(message)


# the policy


@pytest.mark.parametrize(
    ("reason", "days", "with_receipt", "without"),
    [
        ("unwanted", 1, "refund", "replace"),
        ("unwanted", 30, "refund", "replace"),
        ("unwanted", 31, "decline", "decline"),
        ("faulty", 60, "refund", "replace"),
        ("faulty", 61, "replace", "repair"),
        ("faulty", 365, "replace", "repair"),
        ("faulty", 366, "repair", "decline"),
        ("arrived damaged", 14, "refund", "refund"),
        ("arrived damaged", 15, "replace", "repair"),
        ("arrived damaged", 90, "replace", "repair"),
        ("arrived damaged", 91, "decline", "decline"),
        ("accident", 1, "repair", "decline"),
        ("accident", 365, "repair", "decline"),
        ("accident", 366, "decline", "decline"),
    ],
)
def test_the_policy_at_its_borders(reason: str, days: int, with_receipt: str, without: str) -> None:
    assert decide(reason, days, receipt=True) == with_receipt
    assert decide(reason, days, receipt=False) == without


@pytest.mark.parametrize(
    ("count", "unit", "days"), [(14, "day", 14), (2, "week", 14), (3, "month", 90), (2, "year", 730)]
)
def test_times_in_days(count: int, unit: str, days: int) -> None:
    assert Case("lamp", "faulty", count, unit, True).days == days


def test_the_chain_of_thought_names_every_step() -> None:
    case = Case("lamp", "arrived damaged", 2, "month", False)
    assert explain(case) == (
        "The lamp was damaged on the way, so it arrived damaged. It was bought 2 months ago, which is 60 days. "
        "There is no receipt. Items that arrived damaged within 90 days without a receipt are repaired."
    )
    assert "which is" not in explain(Case("lamp", "faulty", 1, "day", True))


# the task file


def test_the_task_file_shows_the_labels_of_the_policy() -> None:
    task = load_task("returns_desk")
    assert set(task.answer.labels) == set(LABELS)
    assert {exemplar.label for exemplar in task.exemplars} == set(LABELS)


def test_no_exemplar_stands_in_the_data(data: dict[str, list[Row]]) -> None:
    shown = {exemplar.input["message"] for exemplar in load_task("returns_desk").exemplars}
    assert shown.isdisjoint(row["message"] for rows in data.values() for row in rows)
