import json
import os
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import UserError
from pipelines.examples import build_examples, read_examples
from pipelines.lineage import Lineage
from pipelines.recipe import load_recipe
from pipelines.tasks import Task

Row = dict[str, Any]
MakeLine = Callable[..., Lineage]
MOOD = Task.model_validate(
    {
        "name": "mood",
        "input": "{text}",
        "answer": {"kind": "choice", "labels": ["good", "bad"], "values": {"1": "good", "0": "bad"}},
    }
)
QUIZ = Task.model_validate(
    {"name": "quiz", "input": "{question}\n{choices}", "answer": {"kind": "row_choice", "choices": "choices"}}
)
ROWS: dict[str, list[Row]] = {
    split: [{"text": f"{split} {n}", "label": "good"} for n in range(3)] for split in ("train", "test", "unlabelled")
}
LONG = " ".join(f"word{n}" for n in range(60))
OTHER = " ".join(f"other{n}" for n in range(60))
REFERENCE = Path(os.environ.get("STEPDISTILL_REFERENCE", Path(__file__).parents[2] / "shared/data/reference"))


def read(
    tmp_path: Path, rows: list[Row], split: str = "train", task: Task = MOOD, limit: int | None = None
) -> list[Row]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_examples(task, str(path), split, limit))


def problem(tmp_path: Path, rows: list[Row], split: str = "train", task: Task = MOOD) -> str:
    """What is said of a file, without the file's name, which must stand first."""
    with pytest.raises(UserError) as error:
        read(tmp_path, rows, split, task)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "rows.jsonl"))
    assert "\n" not in message
    return message.removeprefix(str(tmp_path / "rows.jsonl"))


def inputs(line: Lineage, split: str) -> list[str]:
    return [row["input"] for row in line.examples.iter_rows(split)]


# a row


def test_a_row_becomes_an_example(tmp_path: Path) -> None:
    assert read(tmp_path, [{"text": " Fine day. ", "label": "Good", "more": 1}]) == [
        {
            "row_id": MOOD.row_id("Fine day."),
            "split": "train",
            "position": 0,
            "input": "Fine day.",
            "choices": None,
            "label": "good",
        }
    ]


def test_choices_of_the_row_go_with_it(tmp_path: Path) -> None:
    row = {"question": "Where?", "choices": ["bank ", "train"], "label": "bank"}
    made = read(tmp_path, [row], task=QUIZ)[0]
    assert made["choices"] == ["bank", "train"]
    assert made["input"] == "Where?\n(a) bank\n(b) train"
    assert made["label"] == "bank"


def test_the_same_text_has_the_same_id_in_every_file_format(tmp_path: Path) -> None:
    text = 'She said: "no",\tthen left.'
    (tmp_path / "a.csv").write_text('text,label\n"' + text.replace('"', '""') + '",1\n')
    (tmp_path / "b.json").write_text(json.dumps([{"text": text, "label": 1}]))
    pq.write_table(pa.table({"text": [text, "x"], "label": [1, None]}), tmp_path / "c.parquet")
    made = [next(read_examples(MOOD, str(tmp_path / name), "train")) for name in ("a.csv", "b.json", "c.parquet")]
    assert made[0] == made[1] == made[2]
    assert made[0]["label"] == "good"


@pytest.mark.parametrize("label", [None, "", "  ", float("nan")])
def test_train_may_hold_unlabelled_rows(tmp_path: Path, label: object) -> None:
    assert read(tmp_path, [{"text": "a", "label": label}])[0]["label"] is None
    assert read(tmp_path, [{"text": "a"}])[0]["label"] is None


def test_labels_of_the_unlabelled_split_are_not_looked_at(tmp_path: Path) -> None:
    assert read(tmp_path, [{"text": "a", "label": "nonsense"}], "unlabelled")[0]["label"] is None


def test_a_column_of_integers_with_gaps_is_read_as_labels(tmp_path: Path) -> None:
    assert [e["label"] for e in read(tmp_path, [{"text": "a", "label": 1.0}, {"text": "b", "label": 0}])] == [
        "good",
        "bad",
    ]


@pytest.mark.parametrize(
    "text", ["Übergröße 🧾 \u202eשלום", "a\x00b", "{text} %s {0}", "<b>&amp;</b>", "\ufffd", "x" * 100_000]
)
def test_any_text_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, [{"text": text}])[0]["input"] == text


def test_a_limit_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"body": "no text"}]
    assert [e["position"] for e in read(tmp_path, rows, limit=2)] == [0, 1]


# what is at fault


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"body": "b", "label": "good"}, "no 'text', which the input of task mood asks for; the row has body, label"),
        ({"text": None, "label": "good"}, "no 'text'"),
        ({"text": "b", "label": "grand"}, "label 'grand' is not one of good, bad"),
        ({"text": "b", "label": 2}, "label '2' is not one of good, bad"),
        ({"text": " \n", "label": "good"}, "the input is empty"),
    ],
)
def test_a_row_at_fault_is_named(tmp_path: Path, row: Row, said: str) -> None:
    assert problem(tmp_path, [{"text": "a", "label": "good"}, row]).startswith(f", row 2: {said}")


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(("row", "said"), [({}, "no 'label', the label of task mood"), ({"label": ""}, "needs a gold")])
def test_splits_to_measure_on_need_gold(tmp_path: Path, split: str, row: Row, said: str) -> None:
    assert said in problem(tmp_path, [{"text": "a", **row}], split)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": "bank, train"}, "must be a list of two or more choices, at most 26"),
        ({"choices": ["bank"]}, "must be a list of two or more choices, at most 26"),
        ({"choices": ["bank", "train"], "label": "ship"}, "label 'ship' is not one of bank, train"),
    ],
)
def test_choices_at_fault_are_named(tmp_path: Path, row: Row, said: str) -> None:
    assert said in problem(tmp_path, [{"question": "Where?", **row}], task=QUIZ)


@pytest.mark.parametrize("split", ["train", "validation", "test", "unlabelled"])
def test_an_empty_source_is_refused(tmp_path: Path, split: str) -> None:
    assert problem(tmp_path, [], split) == f": no rows; {split} can't be empty"


# the artefact


def test_every_split_is_written_with_its_counts(make_line: MakeLine) -> None:
    line = make_line()
    counts = build_examples(line).manifest()["counts"]
    assert {split: (count["read"], count["kept"]) for split, count in counts.items()} == {
        "train": (8, 8),
        "validation": (3, 3),
        "test": (3, 3),
        "unlabelled": (4, 4),
    }
    assert inputs(line, "unlabelled") == [f"unlabelled {n}" for n in range(4)]


def test_a_repeated_input_is_kept_once_and_counted(make_line: MakeLine) -> None:
    nfc, nfd = (unicodedata.normalize(form, "Schöner  Tag") for form in ("NFC", "NFD"))
    rows = {
        "train": [{"text": text, "label": "good"} for text in ("a b", " a   b\n", nfc, nfd, "A b")],
        "test": [{"text": "t", "label": "good"}],
    }
    line = make_line(rows=rows)
    assert build_examples(line).manifest()["counts"]["train"] == {
        "read": 5,
        "kept": 3,
        "duplicates": 2,
        "in_another_split": 0,
        "near_duplicates": 0,
        "near_leaks": 0,
        "unlabelled": 0,
    }
    assert inputs(line, "train") == ["a b", nfc, "A b"]
    assert [row["position"] for row in line.examples.iter_rows("train")] == [0, 2, 4]


def test_what_is_tested_is_not_trained_on(make_line: MakeLine, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        "train": [{"text": text, "label": "good"} for text in ("both", "held out", "train")],
        "validation": [{"text": text, "label": "good"} for text in ("both", "held out")],
        "test": [{"text": "both", "label": "bad"}],
        "unlabelled": [{"text": text} for text in ("both", "train", "pool")],
    }
    line = make_line(rows=rows)
    counts = build_examples(line).manifest()["counts"]
    assert {split: inputs(line, split) for split in rows} == {
        "train": ["train"],
        "validation": ["held out"],
        "test": ["both"],
        "unlabelled": ["pool"],
    }
    assert {split: count["in_another_split"] for split, count in counts.items()} == {
        "train": 2,
        "validation": 1,
        "test": 0,
        "unlabelled": 2,
    }
    assert "train: 1 rows; 2 stand in another split and were left out" in capsys.readouterr().out


def test_rows_that_are_left_out_lie_beside_the_others_with_the_reason(make_line: MakeLine) -> None:
    rows = {
        "train": [{"text": text, "label": "good"} for text in ("a", "b", " a", "t", LONG + " four", LONG + " three")],
        "test": [{"text": text, "label": "good"} for text in ("t", LONG + " two")],
        "unlabelled": [{"text": LONG + " three."}, {"text": "B " + OTHER}, {"text": "A " + OTHER}],
    }
    line = make_line("source.near_duplicates=drop", rows=rows)
    counts = build_examples(line).manifest()["counts"]
    removed = list(line.examples.iter_rows("removed"))
    assert [(row["split"], row["position"], row["input"], row["reason"]) for row in removed] == [
        ("train", 2, "a", "duplicates"),
        ("train", 3, "t", "in_another_split"),
        ("train", 4, LONG + " four", "near_leaks"),
        ("train", 5, LONG + " three", "near_leaks"),
        ("unlabelled", 0, LONG + " three.", "near_leaks"),
        ("unlabelled", 2, "A " + OTHER, "near_duplicates"),
    ]
    ids = [line.task.row_id(text) for text in ("a", "t", *[LONG + " two"] * 3, "B " + OTHER)]
    assert [row["of_row_id"] for row in removed] == ids
    assert [row["row_id"] for row in removed] == [line.task.row_id(row["input"]) for row in removed]
    assert [row["similarity"] == 1 for row in removed] == [True, True, False, False, False, False]
    assert all(row["similarity"] > 0.9 for row in removed)
    for split, count in counts.items():
        assert len(inputs(line, split)) == count["kept"]
        assert count["read"] == count["kept"] + sum(row["split"] == split for row in removed)


@pytest.mark.parametrize(
    ("mode", "train", "unlabelled"),
    [("keep", ["1", "2", "3"], ["4"]), ("drop_leaks", ["1", "3"], []), ("drop", ["1"], [])],
)
def test_near_repeats_are_left_out_as_the_recipe_says(
    make_line: MakeLine, mode: str, train: list[str], unlabelled: list[str]
) -> None:
    texts = {"1": f"{OTHER} 1", "2": f"{LONG} 2", "3": f"{OTHER} 3", "4": f"4 {LONG}"}
    rows = {
        "train": [{"text": texts[n], "label": "good"} for n in "123"],
        "test": [{"text": f"{LONG} 0", "label": "good"}, {"text": "t", "label": "good"}],
        "validation": [{"text": f"0 {LONG}", "label": "good"}],  # near to that of test, and kept all the same
        "unlabelled": [{"text": texts["4"]}],
    }
    line = make_line(f"source.near_duplicates={mode}", rows=rows)
    build_examples(line)
    assert inputs(line, "train") == [texts[n] for n in train]
    assert inputs(line, "unlabelled") == [texts[n] for n in unlabelled]
    assert len(inputs(line, "test")) + len(inputs(line, "validation")) == 3


def test_how_near_is_too_near_is_the_recipes_to_say(make_line: MakeLine) -> None:
    rows = {
        "train": [{"text": f"{LONG} 1", "label": "good"}, {"text": "a", "label": "bad"}],
        "test": [{"text": f"{LONG} 0", "label": "good"}],
    }
    for similarity, kept in ((0.98, 2), (0.9, 1)):
        line = make_line(f"source.near_duplicate_similarity={similarity}", rows=rows)
        assert build_examples(line, force=True).manifest()["counts"]["train"]["kept"] == kept


def test_what_was_left_out_is_said_in_a_line(make_line: MakeLine, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        "train": [{"text": text, "label": "good"} for text in (f"{LONG} 1", f"1 {OTHER}", f"2 {OTHER}", f"2 {OTHER}")],
        "test": [{"text": f"{LONG} 0", "label": "good"}],
    }
    line = make_line("source.near_duplicates=drop", rows=rows)
    build_examples(line)
    said = capsys.readouterr().out
    assert "train: 1 rows; 1 repeat an earlier row; 1 nearly repeat an earlier row and were left out; 1 nearly" in said
    assert f"the rows that were left out are in {line.examples.file_uri('removed')}" in said


def test_nothing_is_said_where_nothing_is_left_out(make_line: MakeLine, capsys: pytest.CaptureFixture[str]) -> None:
    line = make_line()
    build_examples(line)
    assert "left out" not in capsys.readouterr().out
    assert list(line.examples.iter_rows("removed")) == []


@pytest.mark.parametrize("split", ["train", "test", "unlabelled"])
def test_a_template_that_shows_nothing_of_the_rows_is_refused(make_line: MakeLine, split: str) -> None:
    rows = {**ROWS, split: [{"text": "same", "body": str(n), "label": "good"} for n in range(3)]}
    line = make_line(rows=rows)
    with pytest.raises(UserError, match=rf"{split}\.jsonl: all 3 rows make the same input; `input` of task mood shows"):
        build_examples(line)
    assert not line.examples.done()


def test_the_same_input_in_one_row_of_each_split_is_no_fault_of_the_template(make_line: MakeLine) -> None:
    rows = {"train": [{"text": t, "label": "good"} for t in "ab"], "test": [{"text": "a", "label": "good"}]}
    assert build_examples(make_line(rows=rows)).manifest()["counts"]["test"]["kept"] == 1


@pytest.mark.parametrize(("count", "different", "warned"), [(20, 9, True), (20, 10, False), (19, 2, False)])
def test_where_most_rows_repeat_the_template_is_questioned(
    make_line: MakeLine, capsys: pytest.CaptureFixture[str], count: int, different: int, warned: bool
) -> None:
    train = [{"text": f"row {n % different}", "label": "good"} for n in range(count)]
    build_examples(make_line(rows={"train": train}))
    assert ("train: more than half of the rows repeat another" in capsys.readouterr().out) == warned


def test_any_text_is_written_as_it_is(make_line: MakeLine) -> None:
    texts = [
        "Übergröße 🧾 \u202eשלום",
        "a\x00b",
        "\x1b[31mred\x7f",
        "\ufffd\uffff",
        "e\u0301",
        "x" * 100_000,
        "?!",
        "y" * 2**21,
    ]
    line = make_line("source.near_duplicates=drop", rows={"train": [{"text": text, "label": "good"} for text in texts]})
    build_examples(line)
    assert inputs(line, "train") == texts


def test_choices_are_written_with_their_row(make_line: MakeLine) -> None:
    rows = {
        "train": [{"question": f"Where {n}?", "choices": ["bank", f"train {n}"], "label": "bank"} for n in range(2)]
    }
    line = make_line(
        rows=rows,
        task=QUIZ.model_dump(include={"name", "input"})
        | {"exemplars": [], "answer": {"kind": "row_choice", "choices": "choices"}},
    )
    build_examples(line)
    assert [row["choices"] for row in line.examples.iter_rows("train")] == [["bank", "train 0"], ["bank", "train 1"]]


# the data that come with the package, and real ones


def test_the_quickstart_loses_no_row() -> None:
    for mode in ("drop_leaks", "drop"):
        with tempfile.TemporaryDirectory() as storage:
            line = Lineage(load_recipe("quickstart", [f"storage={storage}", f"source.near_duplicates={mode}"]))
            assert all(count["kept"] == count["read"] for count in build_examples(line).manifest()["counts"].values())


@pytest.mark.parametrize(
    ("recipe", "rows"), [("svamp", {"train": 800, "test": 200}), ("cqa", {"train": 9741, "test": 1221})]
)
def test_real_sets_lose_no_row(tmp_path: Path, recipe: str, rows: dict[str, int]) -> None:
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference data at {REFERENCE}; STEPDISTILL_REFERENCE can name another folder")
    settings = [f"storage={tmp_path}", f"source.root={REFERENCE / recipe}", "source.near_duplicates=drop"]
    counts = build_examples(Lineage(load_recipe(recipe, settings))).manifest()["counts"]
    assert {split: count["kept"] for split, count in counts.items()} == rows


def test_of_real_pairs_of_sentences_only_those_that_differ_in_a_word_or_two_are_left_out(tmp_path: Path) -> None:
    """Premises stand several times in e-SNLI, each with another hypothesis, often another label."""
    source = REFERENCE / "esnli" / "esnli_valid.json"
    if not source.is_file():
        pytest.skip(f"no reference data at {REFERENCE}; STEPDISTILL_REFERENCE can name another folder")
    settings = [f"storage={tmp_path}", f"source={{train: {source}}}", "source.near_duplicates=drop"]
    line = Lineage(load_recipe("esnli", settings))
    assert build_examples(line).manifest()["counts"]["train"] == {
        "read": 1000,
        "kept": 993,
        "duplicates": 0,
        "in_another_split": 0,
        "near_duplicates": 7,
        "near_leaks": 0,
        "unlabelled": 0,
    }


# the artefact as a whole


def test_rows_of_train_without_a_label_are_counted(make_line: MakeLine, capsys: pytest.CaptureFixture[str]) -> None:
    line = make_line(rows={"train": [{"text": "a", "label": "good"}, {"text": "b"}, {"text": "c", "lable": "good"}]})
    assert build_examples(line).manifest()["counts"]["train"]["unlabelled"] == 2
    assert "train: 3 rows; 2 have no label" in capsys.readouterr().out


def test_a_second_time_nothing_is_read(make_line: MakeLine, capsys: pytest.CaptureFixture[str]) -> None:
    line = make_line()
    finished = build_examples(line).manifest()
    capsys.readouterr()
    assert build_examples(line).manifest() == finished
    assert "skipped" in capsys.readouterr().out


def test_a_source_at_fault_leaves_nothing_that_passes_for_done(make_line: MakeLine) -> None:
    line = make_line(rows={"train": [{"text": "a", "label": "good"}, {"text": "b", "label": "grand"}]})
    with pytest.raises(UserError, match=r"train\.jsonl, row 2"):
        build_examples(line)
    assert not line.examples.done()
