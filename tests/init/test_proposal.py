import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from pipelines.init import columns
from pipelines.init.columns import Sample, look_at
from pipelines.init.proposal import Proposal, choose_inputs, find_label, propose_answer

Row = dict[str, Any]
TEXTS = [f"A message with the number {n} in it." for n in range(60)]


def sample_of(tmp_path: Path, **values: list[Any]) -> Sample:
    """A sample of a file with these columns; shorter ones begin again."""
    length = max(map(len, values.values()))
    rows = [{name: column[n % len(column)] for name, column in values.items()} for n in range(length)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return look_at(str(tmp_path / "rows.jsonl"))


def propose(sample: Sample, label: str = "label", *labels: str) -> Proposal:
    return propose_answer(sample, label, labels)


# the label


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["text", "label"], "label"),
        (["text", "Gold Label", "label"], "Gold Label"),
        (["text", "label", "label_text"], "label_text"),
        (["text", "priority", "queue"], "queue"),
        (["text", "goldLabel"], "goldLabel"),
        (["text", "channel", "ticket_category"], "ticket_category"),
        (["text", "v1"], "v1"),
        (["text", "label_id", "sentiment"], "sentiment"),
        (["text", "answer_a", "answer_b", "answer"], "answer"),
    ],
)
def test_the_label_is_found_by_name_or_as_the_only_column_of_few_values(
    tmp_path: Path, names: list[str], label: str
) -> None:
    sample = sample_of(tmp_path, **{name: TEXTS if name == "text" else ["a", "b", "c"] for name in names})
    assert find_label(sample, None, ())[0] == label


def test_a_given_label_is_taken(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, text=TEXTS, label=["a", "b"], mood=["c", "d"])
    assert find_label(sample, "mood", ()) == ("mood", "as given")


def test_a_label_that_is_not_there_comes_with_the_nearest_name(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, text=TEXTS, label=["a", "b"])
    with pytest.raises(UserError, match=r"--label lable: .*rows.jsonl has no such column; did you mean 'label'\?"):
        find_label(sample, "lable", ())
    with pytest.raises(UserError, match="no such column; it has text, label"):
        find_label(sample, "queue", ())


def test_several_columns_of_few_values_are_a_question(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, text=TEXTS, survived=[0, 1], sex=["f", "m"])
    with pytest.raises(UserError, match="each of survived, sex could be the label; say which with --label"):
        find_label(sample, None, ())


def test_without_a_label_the_answers_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of its columns \(text\) looks like a label; .*--labels a,b,c"):
        find_label(sample_of(tmp_path, text=TEXTS), None, ())


def test_given_labels_find_their_column_or_make_the_rows_unlabelled(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, text=TEXTS, mood=["Good", "bad"], stance=["for", "against"])
    assert find_label(sample, None, ["good", "bad", "mixed"])[0] == "mood"
    assert find_label(sample, None, ["yes", "no"])[0] is None


def test_given_labels_name_the_numbers_of_a_label_column_alone(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, text=TEXTS, votes=[0, 1], label=[1, 0])
    assert find_label(sample, None, ["ham", "spam"])[0] == "label"


# the kind of answer


def test_few_labels_that_recur_are_a_choice_the_most_frequent_first(tmp_path: Path) -> None:
    proposal = propose(sample_of(tmp_path, text=TEXTS, label=["b", "b", "a", "c", "b", "a"]))
    assert proposal.answer.kind == "choice"
    assert proposal.answer.labels == ("b", "a", "c")
    assert proposal.counts == Counter(b=30, a=20, c=10)
    assert proposal.why == "3 labels recur, 20 times each on average"


def test_ratings_are_a_choice_in_their_order_and_may_be_named(tmp_path: Path) -> None:
    proposal = propose(sample_of(tmp_path, text=TEXTS, label=[5, 5, 4, 1, 3, 2]))
    assert proposal.answer.labels == ("1", "2", "3", "4", "5")
    assert proposal.answer.values == {n: n for n in "12345"}
    assert "say little to a teacher" in proposal.notes[0]


def test_truth_values_are_a_choice(tmp_path: Path) -> None:
    proposal = propose(sample_of(tmp_path, text=TEXTS, label=[True, False, False]))
    assert proposal.answer.labels == ("False", "True")


def test_whole_numbers_that_were_read_as_floats_find_their_labels(tmp_path: Path) -> None:
    answer = propose(sample_of(tmp_path, text=TEXTS, label=[0.0, 1.0, None])).answer
    assert answer.labels == ("0", "1")
    assert answer.values == {"0": "0", "1": "1"}


def test_given_labels_name_numbers_in_their_order(tmp_path: Path) -> None:
    proposal = propose(sample_of(tmp_path, text=TEXTS, label=[2, 1, 2]), "label", "no", "yes")
    assert proposal.answer.labels == ("no", "yes")
    assert proposal.answer.values == {"1": "no", "2": "yes"}
    assert proposal.counts == Counter(no=20, yes=40)
    assert "1 for no, 2 for yes" in proposal.notes[0]


def test_numbers_that_are_not_as_many_as_the_given_labels_are_not_named(tmp_path: Path) -> None:
    assert propose(sample_of(tmp_path, text=TEXTS, label=[0, 1]), "label", "a", "b", "c").answer.values == {}


def test_spellings_that_a_task_takes_for_the_same_are_one_label(tmp_path: Path) -> None:
    proposal = propose(sample_of(tmp_path, text=TEXTS, label=["Spam", "ham", "spam.", "Spam", "ham", "ham"]))
    assert proposal.answer.labels == ("ham", "Spam")
    assert proposal.counts == Counter(Spam=30, ham=30)
    assert "label 'spam.' of 10 rows counts as 'Spam'" in proposal.notes


def test_labels_of_all_rows_read_are_counted_not_of_the_sample_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "SAMPLE_ROWS", 50)
    labels = ["a", "b"] * 500 + ["rare"]
    proposal = propose(sample_of(tmp_path, text=[f"t {n}" for n in range(1001)], label=labels))
    assert proposal.counts == Counter(a=500, b=500, rare=1)


@pytest.mark.parametrize(
    "labels", [[f"( {n}.0 - 3.0 )" for n in range(60)], list(range(60)), [str(n * 1.5) for n in range(60)]]
)
def test_arithmetic_of_which_little_recurs_is_an_expression(tmp_path: Path, labels: list[Any]) -> None:
    proposal = propose(sample_of(tmp_path, text=TEXTS, label=labels))
    assert proposal.answer.kind == "expression"
    assert proposal.why == "all are arithmetic, 60 of 60 labels differ"


def test_labels_that_mostly_differ_are_text(tmp_path: Path) -> None:
    proposal = propose(sample_of(tmp_path, text=TEXTS, label=[*map(str, range(59)), "n/a"]))
    assert (proposal.answer.kind, proposal.why) == ("text", "60 of 60 labels differ")


def test_a_label_among_the_rows_choices_is_a_row_choice(tmp_path: Path) -> None:
    choices = [[f"word {n}", f"other {n}"] for n in range(60)]
    sample = sample_of(tmp_path, question=TEXTS, options=choices, answer=[f"Other {n}" for n in range(60)])
    answer = propose(sample, "answer").answer
    assert (answer.kind, answer.choices) == ("row_choice", "options")


@pytest.mark.parametrize("places", [[0, 1, 2], ["A", "B", "C"]])
def test_the_place_of_a_choice_is_no_answer(tmp_path: Path, places: list[Any]) -> None:
    sample = sample_of(tmp_path, question=TEXTS, choices=[["x", "y", "z"]], answer=places)
    with pytest.raises(UserError, match="'answer' says which of the choices is right by its place"):
        propose(sample, "answer")


@pytest.mark.parametrize(
    ("names", "labels", "marks"),
    [
        (["A", "B", "C"], ["A", "C", "C"], "ABC"),
        (["choice_a", "choice_b"], ["a", "b"], "ab"),
        (["option1", "option2"], [1, 2], "12"),
        (["ending0", "ending1", "ending2"], ["0", "2"], "012"),
    ],
)
def test_columns_of_choices_are_marked_as_the_labels_name_them(
    tmp_path: Path, names: list[str], labels: list[Any], marks: str
) -> None:
    words = {name: [f"{name} of {n}" for n in range(60)] for name in names}
    proposal = propose(sample_of(tmp_path, question=TEXTS, **words, label=labels))
    assert proposal.answer.labels == tuple(marks)
    assert proposal.marks == dict(zip(names, marks, strict=True))


def test_columns_of_choices_with_a_label_in_words_are_lettered_text(tmp_path: Path) -> None:
    words = {f"choice_{sign}": [f"{sign} of {n}" for n in range(60)] for sign in "pq"}
    sample = sample_of(tmp_path, question=TEXTS, **words, label=[f"{'pq'[n % 2]} of {n}" for n in range(60)])
    proposal = propose(sample)
    assert proposal.answer.kind == "text"
    assert proposal.marks == {"choice_p": "a", "choice_q": "b"}
    assert "the kind could be row_choice" in proposal.notes[0]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (["ham"], "holds one label, 'ham', in every row looked at, and a task needs two"),
        ([None, ""], "is empty in every row looked at"),
        ([["a"], ["a", "b"]], "holds lists or objects, but an answer is one text"),
        ([{"a": 1}], "holds lists or objects"),
        ([["a"], "a"], "holds lists or objects"),
        (["Yes", "yes"], r"labels Yes: a task needs two or more, which differ in more than capitals"),
        (["...", "a", "b"], r"a task needs two or more"),
    ],
)
def test_a_label_that_can_be_no_answer(tmp_path: Path, label: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        propose(sample_of(tmp_path, text=TEXTS, label=label))


@pytest.mark.parametrize("labels", [["a"], ["a", "A"], ["a", "."]])
def test_given_labels_must_be_two(tmp_path: Path, labels: list[str]) -> None:
    with pytest.raises(UserError, match="a task needs two or more"):
        propose_answer(sample_of(tmp_path, text=TEXTS), None, labels)


# the inputs


def inputs_of(sample: Sample, given: tuple[str, ...] = ()) -> tuple[list[str], dict[str, str]]:
    return choose_inputs(sample, "label", propose(sample), given)


def test_inputs_are_text_that_is_no_id_no_constant_and_does_not_tell_the_label(tmp_path: Path) -> None:
    sample = sample_of(
        tmp_path,
        uid=[f"x{n}" for n in range(60)],
        created=[f"2024-01-{n}" for n in range(10, 30)],
        language=["en"],
        channel=["mail", "phone"],
        size=list(range(60)),
        tags=[["a"]],
        subject=[text.upper() for text in TEXTS],
        body=TEXTS,
        explanation_1=TEXTS,
        notes=[None, *TEXTS],
        label=["a", "b"],
    )
    inputs, left_out = inputs_of(sample)
    assert inputs == ["subject", "body"]
    assert left_out == {
        "uid": "an id",
        "created": "a date",
        "language": "always the same",
        "channel": "few values",
        "size": "numbers",
        "tags": "lists",
        "explanation_1": "it explains the label, and a student has nothing like it to read",
        "notes": "empty in 1 of 61 rows",
    }


def test_given_inputs_are_taken_in_their_order(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, subject=TEXTS, body=TEXTS, channel=["mail", "phone"], label=["a", "b"])
    assert inputs_of(sample, ("channel", "body")) == (["channel", "body"], {"subject": "not named"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("bodi", r"--input bodi: .* has no such column; did you mean 'body'\?"),
        ("label", "--input label: this column is the label"),
        ("tags", "--input tags: .* holds lists or objects there"),
    ],
)
def test_an_input_that_cannot_be_read(tmp_path: Path, given: str, said: str) -> None:
    sample = sample_of(tmp_path, body=TEXTS, tags=[["a"]], label=["a", "b"])
    with pytest.raises(UserError, match=said):
        inputs_of(sample, (given,))


def test_without_text_the_numbers_are_read(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, id=list(range(60)), width=[1.5, 2.5, 3.5], sex=["f", "m"], label=["a", "b"])
    assert inputs_of(sample)[0] == ["width", "sex"]


def test_the_only_text_is_read_though_it_has_gaps(tmp_path: Path) -> None:
    assert inputs_of(sample_of(tmp_path, body=[None, *TEXTS], size=[1, 2], label=["a", "b"]))[0] == ["body"]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="besides the label no column is of use as an input"):
        inputs_of(sample_of(tmp_path, id=list(range(60)), label=["a", "b"]))


@pytest.mark.parametrize("name", ["Customer message (EN)", "été", "a-b", "two\nlines", "x y", "$", "a]"])
def test_names_that_a_template_can_hold(tmp_path: Path, name: str) -> None:
    assert inputs_of(sample_of(tmp_path, **{name: TEXTS, "label": ["a", "b"]}))[0] == [name]


@pytest.mark.parametrize(
    ("name", "plain"),
    [("a.b", "a_b"), ("a[0]", "a_0"), ("0", "column_0"), ("{x}", "x"), ("a:b", "a_b"), ("a!r", "a_r"), ("", "column")],
)
def test_names_that_a_template_cannot_hold_come_with_another(tmp_path: Path, name: str, plain: str) -> None:
    sample = sample_of(tmp_path, **{name: TEXTS, "label": ["a", "b"]})
    with pytest.raises(UserError, match=rf"can't stand in a template, .*; rename it, e.g. to '{plain}'"):
        inputs_of(sample)


def test_choices_are_read_last_and_are_not_asked_for_twice(tmp_path: Path) -> None:
    choices = [[f"word {n}", f"other {n}"] for n in range(60)]
    sample = sample_of(tmp_path, choices=choices, question=TEXTS, label=[f"word {n}" for n in range(60)])
    assert inputs_of(sample) == inputs_of(sample, ("choices", "question")) == (["question", "choices"], {})
