"""The dataset of examples and given texts; and, in memory, which of its rows a student learns from."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifact import Artifact
from pipelines.dataset import build_dataset
from pipelines.draw import TrainRow, count_rows, draw_rows, position_in_unit
from pipelines.errors import UserError
from pipelines.examples import build_examples
from pipelines.lineage import Lineage
from pipelines.rationales import build_rationales
from pipelines.recipe import Run
from pipelines.schema import RATIONALES, REJECTED

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
        {
            "teacher": "outputs",
            "sample": 0,
            "rationale": "Because it is agreed.",
            "label": "good",
            "agreement": 1.0,
            "rationalized": False,
            "reason": None,
        }
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


def test_rows_stand_in_the_order_of_the_source_unlabelled_ones_last(make_line: MakeLine) -> None:
    rows: dict[str, list[Row]] = {
        "unlabelled": [{"text": f"pool {n}"} for n in range(3000)],
        "train": [{"text": f"row {n}", "label": "good"} for n in range(1500)],
    }
    line = make_dataset(make_line, rows)
    assert [row["input"] for row in line.dataset.iter_rows("train") if row["input"].startswith("pool")] == [
        row["text"] for row in rows["unlabelled"]
    ]
    train = {row["text"] for row in rows["train"]} - by_input(line, "validation").keys()
    assert [row["input"] for row in line.dataset.iter_rows("train")][: len(train)] == [
        row["text"] for row in rows["train"] if row["text"] in train
    ]


def test_any_text_comes_through_as_it_is(make_line: MakeLine) -> None:
    texts = ["a\x00b", "🧾 \u202eשלום", "\ufffd", "x" * 100_000, "e\u0301"]
    line = make_line(rows={"train": [{"text": text, "label": "good"} for text in texts], "test": ROWS["test"]})
    build_examples(line)
    write_rationales(line, [said(line, text, rationale=f"why {text}") for text in texts])
    build_dataset(line)
    rows = by_input(line, "train") | by_input(line, "validation")
    assert rows.keys() == set(texts)
    assert [row["rationales"][0]["rationale"] for text, row in by_input(line, "train").items()] == [
        f"why {text}" for text in by_input(line, "train")
    ]


# several texts of one row


def said(line: Lineage, text: str, label: str | None = "good", **more: Any) -> Row:
    """A row of the rationales artefact."""
    row_id = line.task.row_id(text)
    return {
        **dict.fromkeys(REJECTED.names),
        **{"row_id": row_id, "split": "train", "sample": 0, "teacher": "t", "rationale": "why", "label": label},
        **{"rationalized": False, "agreement": 0.5},
        **more,
    }


def write_rationales(
    line: Lineage, accepted: list[Row], rejected: Sequence[Row] = (), artifact: Artifact | None = None
) -> None:
    artifact = artifact or line.rationales
    artifact.begin(force=True)
    with artifact.writer("accepted", RATIONALES) as writer:
        for row in accepted:
            writer.add(row)
    with artifact.writer("rejected", REJECTED) as writer:
        for row in rejected:
            writer.add(row)
    artifact.finish({}, [], 0.0)


@pytest.fixture
def line(make_line: MakeLine) -> Lineage:
    made = make_line(rows={**ROWS, "train": [{"text": "row", "label": "good"}, {"text": "other", "label": "bad"}]})
    build_examples(made)
    return made


def test_texts_of_a_row_stand_by_teacher_and_sample(line: Lineage) -> None:
    rows = [said(line, "row", teacher=teacher, sample=sample) for sample in (10, 2, 0) for teacher in ("b", "a", "B")]
    write_rationales(line, rows[::2], [row | {"reason": "too_short"} for row in rows[1::2]])
    build_dataset(line)
    made = by_input(line, "train")["row"]["rationales"]
    assert [(r["teacher"], r["sample"]) for r in made] == [(t, s) for t in ("B", "a", "b") for s in (0, 2, 10)]
    assert {(r["teacher"], r["sample"]) for r in made if r["reason"]} == {
        (row["teacher"], row["sample"]) for row in rows[1::2]
    }


@pytest.mark.parametrize(
    ("labels", "winner"),
    [
        (["good"], "good"),
        (["bad", "good", "good"], "good"),
        (["Good", "good", "bad", "bad", "bad."], "bad"),
        (["bad", "good"], "bad"),
        (["good", "bad", "bad", "good"], "good"),
        ([None, "bad"], "bad"),
        ([None], None),
        ([], None),
    ],
)
def test_the_teachers_label_is_what_most_texts_say_or_the_first_of_them(
    line: Lineage, labels: list[str | None], winner: str | None
) -> None:
    rows = [said(line, "row", label, sample=n) for n, label in enumerate(labels)]
    write_rationales(line, rows[1:], [row | {"reason": "disagrees_with_gold"} for row in rows[:1]])
    build_dataset(line)
    assert by_input(line, "train")["row"]["teacher_label"] == winner
    assert by_input(line, "train")["other"]["teacher_label"] is None


def test_of_equal_votes_the_first_teachers_counts(line: Lineage) -> None:
    write_rationales(line, [said(line, "row", "good", teacher="b"), said(line, "row", "bad", teacher="a")])
    build_dataset(line)
    assert by_input(line, "train")["row"]["teacher_label"] == "bad"


def test_expressions_vote_by_their_value(make_line: MakeLine) -> None:
    rows = {
        "train": [{"text": "row", "label": "7"}, {"text": "other", "label": "8"}],
        "validation": [{"text": "v", "label": "1"}],
    }
    line = make_line(rows=rows, task={"answer": {"kind": "expression"}, "exemplars": []})
    build_examples(line)
    write_rationales(line, [said(line, "row", label, sample=n) for n, label in enumerate(["8", "3 + 4", "7"])])
    build_dataset(line)
    assert by_input(line, "train")["row"]["teacher_label"] == "3 + 4"


def test_a_text_that_was_told_the_gold_label_does_not_vote(line: Lineage) -> None:
    told = [said(line, "row", "good", sample=n, rationalized=True) for n in (1, 2)]
    write_rationales(line, told, [said(line, "row", "bad", reason="disagrees_with_gold")])
    build_dataset(line)
    row = by_input(line, "train")["row"]
    assert row["teacher_label"] == "bad"
    assert [r["rationalized"] for r in row["rationales"]] == [False, True, True]


def test_a_row_whose_only_text_was_told_the_gold_label_has_no_teachers_label(line: Lineage) -> None:
    write_rationales(line, [said(line, "row", rationalized=True)])
    build_dataset(line)
    row = by_input(line, "train")["row"]
    assert (row["teacher_label"], len(row["rationales"])) == (None, 1)


# further rationales, of other teachers


@pytest.fixture
def further(tmp_path: Path) -> Artifact:
    return Artifact(str(tmp_path / "elsewhere" / "rationales" / "0123"), "rationales", "0123")


def with_further(line: Lineage, *folders: str) -> Lineage:
    dataset = line.recipe.dataset.model_copy(update={"rationales": folders})
    return Lineage(line.recipe.model_copy(update={"dataset": dataset}))


def test_rationales_of_other_teachers_are_joined_by_row_id(line: Lineage, further: Artifact) -> None:
    write_rationales(line, [said(line, "row", "good", teacher="b")])
    theirs = [said(line, "row", "bad", teacher="a"), said(line, "row", "bad", teacher="c"), said(line, "nowhere")]
    write_rationales(line, theirs, artifact=further)
    both = with_further(line, further.uri)
    build_dataset(both)
    row = by_input(both, "train")["row"]
    assert [(r["teacher"], r["label"]) for r in row["rationales"]] == [("a", "bad"), ("b", "good"), ("c", "bad")]
    assert row["teacher_label"] == "bad"
    manifest = both.dataset.manifest()
    assert manifest["rows_of_rationales"] == {line.rationales.uri: 1, further.uri: 1}
    assert manifest["parents"]["rationales"] == line.rationales.key


def test_rationales_of_other_rows_are_refused(line: Lineage, further: Artifact) -> None:
    write_rationales(line, [said(line, "row")])
    write_rationales(line, [said(line, "nowhere"), said(line, "test")], artifact=further)
    both = with_further(line, further.uri)
    with pytest.raises(UserError, match=f"dataset.rationales: {further.uri} speaks of none of the rows"):
        build_dataset(both)
    assert not both.dataset.done()


def test_rationales_without_a_manifest_are_refused(line: Lineage, further: Artifact) -> None:
    write_rationales(line, [said(line, "row")])
    with pytest.raises(UserError, match=r"no manifest\.json"):
        build_dataset(with_further(line, further.uri))


def test_the_same_rationales_do_not_vote_twice(line: Lineage, further: Artifact) -> None:
    write_rationales(line, [said(line, "row")])
    write_rationales(line, [said(line, "row")], artifact=further)
    for folders in ([line.rationales.uri], [further.uri, further.uri + "/"]):
        with pytest.raises(UserError, match="stand there twice"):
            build_dataset(with_further(line, *folders))


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
    rationale = {"teacher": "t", "sample": 0, "rationale": f"why {number}", "label": said, "rationalized": False}
    rationale["agreement"] = 1.0
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


def first(row: TrainRow) -> str | None:
    """The rationale that a student takes when it takes one."""
    return row.rationales[0].text if row.rationales else None


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
    assert {r.rationales for r in one} == {()}
    assert all(first(r) == f"why {r.input.split()[1]}" for r in other)


def test_a_fraction_is_of_the_rows_that_have_such_a_label() -> None:
    rows = [row(n, gold="good" if n % 2 else None) for n in range(40)]
    assert len(draw_rows(rows, Run(arm="standard", fraction=0.5))) == 10
    assert len(draw_rows(rows, Run(arm="standard", labels="teacher", fraction=0.5))) == 20


def test_gold_students_take_every_gold_label_and_no_disputed_rationale() -> None:
    rows = [row(1), row(2, gold="bad", said="good"), row(3, said=None), row(4, gold=None)]
    drawn = {r.row_id: (r.label, first(r)) for r in draw_rows(rows, Run(arm="step_by_step"))}
    assert drawn == {"id1": ("good", "why 1"), "id2": ("bad", None), "id3": ("good", None)}


def test_teacher_students_never_look_at_gold() -> None:
    run = Run(arm="step_by_step", labels="teacher")
    rows = [row(1), row(2, gold="bad", said="good"), row(3, said=None), row(4, gold=None)]
    drawn = draw_rows(rows, run)
    assert {r.row_id: (r.label, first(r)) for r in drawn} == {
        "id1": ("good", "why 1"),
        "id2": ("good", "why 2"),
        "id4": ("good", "why 4"),
    }
    assert draw_rows([row(1, None), row(2, None), row(3, None, None), row(4, None)], run) == drawn


def test_teacher_students_learn_no_rationale_that_was_told_gold_or_argues_for_another_label() -> None:
    told, other = row(1), row(2)
    told["rationales"][0]["rationalized"] = True
    other["rationales"].insert(0, other["rationales"][0] | {"label": "bad", "rationale": "because"})
    drawn = draw_rows([told, other], Run(arm="step_by_step", labels="teacher"))
    assert {r.row_id: first(r) for r in drawn} == {"id1": None, "id2": "why 2"}
    gold = draw_rows([told], Run(arm="step_by_step"))
    assert [first(r) for r in gold] == ["why 1"], "a student of gold labels may know of gold"


def test_several_rationales_of_a_row_come_in_their_order_with_who_said_them_and_how_many_agree() -> None:
    several = row(1)
    first_said = several["rationales"][0] | {"agreement": 0.75}
    second = first_said | {"teacher": "other", "rationale": "because", "agreement": None}
    several["rationales"] = [first_said, second]
    drawn = draw_rows([several], Run(arm="step_by_step"))[0]
    assert [(r.text, r.teacher == "other", r.agreement) for r in drawn.rationales] == [
        ("why 1", False, 0.75),
        ("because", True, 1.0),
    ]
    assert drawn.agreement == 1.0, "a gold label is certain"
    assert (
        draw_rows([several | {"rationales": [first_said]}], Run(arm="standard", labels="teacher"))[0].agreement == 0.75
    )


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("labels", ["gold", "teacher"])
def test_rows_are_counted_as_they_are_drawn(labels: Any, fraction: float) -> None:
    rows = [row(n, gold=("good", "bad", None)[n % 3], said=None if n % 5 == 0 else "good") for n in range(100)]
    run = Run(arm="step_by_step", labels=labels, fraction=fraction, seed=3)
    drawn = draw_rows(rows, run)
    assert 0 < sum(bool(r.rationales) for r in drawn) < 100
    assert count_rows(rows, run) == (len(drawn), sum(bool(r.rationales) for r in drawn))
    assert count_rows([], run) == (0, 0)


def test_positions_are_even_and_depend_on_the_seed() -> None:
    positions = [position_in_unit(f"id{n}") for n in range(2000)]
    assert min(positions) >= 0
    assert max(positions) < 1
    assert abs(sum(positions) / 2000 - 0.5) < 0.03
    assert position_in_unit("id1", 0) != position_in_unit("id1", 1) != position_in_unit("id1")
    assert position_in_unit("id1") == position_in_unit("id1")


def test_of_several_teachers_a_run_may_hear_one_alone() -> None:
    """Its labels and its rationales; who was not asked by it is no row of its."""
    both, one = row(0), row(1)
    other = both["rationales"][0] | {"teacher": "u", "rationale": "why not", "label": "bad"}
    rows = [both | {"rationales": [*both["rationales"], other]}, one]
    heard = {run.teacher: draw_rows(rows, run) for run in (Run(arm="step_by_step", teacher=t) for t in ("t", "u"))}
    assert [sorted(r.text for made in heard[t] for r in made.rationales) for t in ("t", "u")] == [
        ["why 0", "why 1"],
        ["why not"],
    ]
    assert len(heard["u"]) == 2, "gold labels are no teacher's"
    (of_u,) = draw_rows(rows, Run(arm="step_by_step", labels="teacher", teacher="u"))
    assert (of_u.row_id, of_u.label, [r.text for r in of_u.rationales]) == ("id0", "bad", ["why not"])
