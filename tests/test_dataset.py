"""The dataset of examples and given texts; and, in memory, which of its rows a student learns from."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from pipelines.dataset import build_dataset
from pipelines.draw import TrainRow, draw_rows, position_in_unit
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.rationales import build_rationales
from pipelines.recipe import Run

Row = dict[str, Any]
MakeLine = Callable[..., Lineage]

ROWS: dict[str, list[Row]] = {
    "train": [
        {"text": "agreed", "label": "good"},
        {"text": "disputed", "label": "bad"},
        {"text": "unreadable", "label": "good"},
        {"text": "never asked", "label": "bad"},
        {"text": "no gold"},
    ],
    "validation": [{"text": "seen by the teacher", "label": "good"}],
    "test": [{"text": "test", "label": "good"}],
    "unlabelled": [{"text": "pool", "label": "never read"}],
}
TEXTS: dict[str, list[Row]] = {
    "train": [
        {"text": "agreed"},
        {"text": "disputed"},
        {"text": "unreadable"},
        {"text": "no gold"},
    ],
    "validation": [{"text": "seen by the teacher"}],
    "test": [{"text": "test"}],
    "unlabelled": [{"text": "pool"}],
}


def answers(line: Lineage, rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """An output of the teacher for each row: good, except where it can't be read."""
    return {
        split: [
            {
                "row_id": line.task.row_id(row["text"]),
                "text": f"Because it is {row['text']}."
                + ("" if row["text"] == "unreadable" else " So the answer is good."),
            }
            for row in content
        ]
        for split, content in rows.items()
    }


def make_dataset(make_line: MakeLine, rows: dict[str, list[Row]] = ROWS, *overrides: str) -> Lineage:
    texts = answers(make_line(), {split: content for split, content in TEXTS.items() if split in rows})
    line = make_line(*overrides, rows=rows, texts=texts)
    build_rationales(line)
    build_dataset(line)
    return line


def by_input(line: Lineage, split: str) -> dict[str, Row]:
    return {row["input"]: row for row in line.dataset.iter_rows(split)}


# the artefact


def test_train_holds_labelled_and_unlabelled_rows_with_what_the_teacher_said(make_line: MakeLine) -> None:
    train = by_input(make_dataset(make_line), "train")
    assert {text: (row["label"], row["teacher_label"], len(row["rationales"])) for text, row in train.items()} == {
        "agreed": ("good", "good", 1),
        "disputed": ("bad", "good", 1),
        "unreadable": ("good", None, 0),
        "never asked": ("bad", None, 0),
        "no gold": (None, "good", 1),
        "pool": (None, "good", 1),
    }
    assert train["agreed"]["rationales"] == [
        {"teacher": "outputs", "sample": 0, "rationale": "Because it is agreed.", "label": "good", "reason": None}
    ]


def test_what_disagrees_with_gold_is_kept_for_students_of_teacher_labels(make_line: MakeLine) -> None:
    disputed = by_input(make_dataset(make_line), "train")["disputed"]
    assert [r["reason"] for r in disputed["rationales"]] == ["disagrees_with_gold"]


def test_disagreement_can_be_kept_for_all(make_line: MakeLine) -> None:
    train = by_input(make_dataset(make_line, ROWS, "curate.on_disagree=keep"), "train")
    assert [r["reason"] for r in train["disputed"]["rationales"]] == [None]


def test_splits_to_measure_on_carry_nothing_of_the_teacher(make_line: MakeLine) -> None:
    line = make_dataset(make_line)
    for split, text in (("validation", "seen by the teacher"), ("test", "test")):
        row = by_input(line, split)[text]
        assert (row["label"], row["teacher_label"], row["rationales"]) == ("good", None, [])


def test_rows_are_counted(make_line: MakeLine) -> None:
    counts = make_dataset(make_line).dataset.manifest()["counts"]
    assert counts == {
        "train": 5,
        "unlabelled": 1,
        "validation": 1,
        "test": 1,
        "gold": 4,
        "teacher_label": 4,
        "rationale": 3,
    }


def test_every_row_keeps_its_id(make_line: MakeLine) -> None:
    line = make_dataset(make_line)
    for split in ("train", "validation", "test"):
        for text, row in by_input(line, split).items():
            assert row["row_id"] == line.task.row_id(text)


def test_without_rationales_the_command_that_makes_them_is_named(make_line: MakeLine) -> None:
    with pytest.raises(UserError, match="run `distill rationales` first"):
        build_dataset(make_line())


def test_a_second_time_nothing_is_done(make_line: MakeLine, capsys: pytest.CaptureFixture[str]) -> None:
    line = make_dataset(make_line)
    finished = line.dataset.manifest()
    capsys.readouterr()
    build_dataset(line)
    assert line.dataset.manifest() == finished
    assert "skipped" in capsys.readouterr().out


# validation held out of train


def without_validation(count: int) -> dict[str, list[Row]]:
    return {"train": [{"text": f"row {n}", "label": ("good", "bad", None)[n % 3]} for n in range(count)]}


def test_without_a_validation_split_a_share_of_train_is_held_out(make_line: MakeLine) -> None:
    line = make_dataset(make_line, {**without_validation(300), "test": ROWS["test"]}, "source.validation_share=0.2")
    train, validation = by_input(line, "train"), by_input(line, "validation")
    assert train.keys().isdisjoint(validation)
    assert len(train) + len(validation) == 300
    assert 20 < len(validation) < 60  # a fifth of the 200 that have gold
    assert line.dataset.manifest()["validation_from_train"]


def test_what_is_held_out_has_gold_and_carries_nothing_of_the_teacher(make_line: MakeLine) -> None:
    line = make_dataset(make_line, {"train": ROWS["train"], "test": ROWS["test"]}, "source.validation_share=0.999")
    assert by_input(line, "train").keys() == {"no gold"}
    assert by_input(line, "validation").keys() == {"agreed", "disputed", "unreadable", "never asked"}
    assert all(
        row["rationales"] == [] and row["teacher_label"] is None for row in by_input(line, "validation").values()
    )


def test_a_row_stays_held_out_whatever_stands_beside_it(make_line: MakeLine) -> None:
    few, many = (
        by_input(make_dataset(make_line, {**without_validation(count), "test": ROWS["test"]}), "validation").keys()
        for count in (150, 300)
    )
    assert few
    assert few == {text for text in many if int(text.split()[1]) < 150}


def test_a_given_validation_split_takes_nothing_from_train(make_line: MakeLine) -> None:
    line = make_dataset(make_line, ROWS, "source.validation_share=0.999")
    assert by_input(line, "train").keys() == {row["text"] for row in ROWS["train"] + ROWS["unlabelled"]}
    assert not line.dataset.manifest()["validation_from_train"]


# which rows a student learns from


def row(number: int, gold: str | None = "good", said: str | None = "good") -> Row:
    """A row of the dataset; the teacher said something with label `said`, which gold may speak against."""
    rationale = {"teacher": "t", "sample": 0, "rationale": f"why {number}", "label": said}
    return {
        "row_id": f"id{number}",
        "input": f"text {number}",
        "label": gold,
        "teacher_label": said,
        "rationales": [rationale | {"reason": None if gold in (None, said) else "disagrees_with_gold"}] if said else [],
    }


def ids(rows: list[TrainRow]) -> list[str]:
    return [r.row_id for r in rows]


HUNDRED = [row(n) for n in range(100)]


@pytest.mark.parametrize("labels", ["gold", "teacher"])
def test_a_smaller_fraction_lies_within_a_larger_one(labels: Any) -> None:
    drawn = [
        ids(draw_rows(HUNDRED, Run(arm="standard", labels=labels, fraction=f, seed=1))) for f in (0.125, 0.25, 0.5, 1)
    ]
    assert [len(d) for d in drawn] == [12, 25, 50, 100]
    for smaller, larger in pairwise(drawn):
        assert larger[: len(smaller)] == smaller


def test_another_seed_draws_other_rows() -> None:
    drawn = [frozenset(ids(draw_rows(HUNDRED, Run(arm="standard", fraction=0.25, seed=seed)))) for seed in range(5)]
    assert len(set(drawn)) == 5


def test_arms_learn_from_the_same_rows_in_the_same_order_whatever_the_order_read() -> None:
    one = draw_rows(HUNDRED, Run(arm="standard", fraction=0.5))
    other = draw_rows(reversed(HUNDRED), Run(arm="step_by_step", fraction=0.5))
    assert ids(one) == ids(other)
    assert {r.rationale for r in one} == {None}
    assert all(r.rationale == f"why {r.input.split()[1]}" for r in other)


def test_a_fraction_is_of_the_rows_that_have_such_a_label() -> None:
    rows = [row(n, gold="good" if n % 2 else None) for n in range(40)]
    assert len(draw_rows(rows, Run(arm="standard", fraction=0.5))) == 10
    assert len(draw_rows(rows, Run(arm="standard", labels="teacher", fraction=0.5))) == 20


def test_gold_students_take_every_gold_label_and_no_disputed_rationale() -> None:
    rows = [row(1), row(2, gold="bad", said="good"), row(3, said=None), row(4, gold=None)]
    drawn = {r.row_id: (r.label, r.rationale) for r in draw_rows(rows, Run(arm="step_by_step"))}
    assert drawn == {"id1": ("good", "why 1"), "id2": ("bad", None), "id3": ("good", None)}


def test_teacher_students_never_look_at_gold() -> None:
    run = Run(arm="step_by_step", labels="teacher")
    rows = [row(1), row(2, gold="bad", said="good"), row(3, said=None), row(4, gold=None)]
    drawn = draw_rows(rows, run)
    assert {r.row_id: (r.label, r.rationale) for r in drawn} == {
        "id1": ("good", "why 1"),
        "id2": ("good", "why 2"),
        "id4": ("good", "why 4"),
    }
    assert draw_rows([row(1, None), row(2, None), row(3, None, None), row(4, None)], run) == drawn


def test_positions_are_even_and_depend_on_the_seed() -> None:
    positions = [position_in_unit(f"id{n}") for n in range(2000)]
    assert min(positions) >= 0
    assert max(positions) < 1
    assert abs(sum(positions) / 2000 - 0.5) < 0.03
    assert position_in_unit("id1", 0) != position_in_unit("id1", 1) != position_in_unit("id1")
    assert position_in_unit("id1") == position_in_unit("id1")
