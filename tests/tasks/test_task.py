import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.errors import UserError
from pipelines.tasks import Answer, Task, load_task
from pipelines.tasks.task import Length

SENTIMENT = """
name: sentiment
input: "{text}"
answer:
  kind: choice
  labels: [good, bad]
exemplars:
  - {input: {text: I would buy it again.}, rationale: They would buy it again., label: good}
"""
WHY = "They would buy it again."


def task(**keys: Any) -> Task:
    return Task.model_validate(
        {"name": "t", "input": "{text}", "answer": {"kind": "choice", "labels": ["good", "bad"]}} | keys
    )


def quiz(**keys: Any) -> Task:
    answer = {"kind": "row_choice", "choices": "choices"}
    return Task.model_validate({"name": "quiz", "input": "{question}\n{choices}", "answer": answer} | keys)


def problem(tmp_path: Path, text: str) -> str:
    """What load_task says of a task file with this text."""
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_task(str(path))
    message = str(error.value)
    assert message.startswith(str(path)), "a message names the file"
    assert "\n" not in message, "a message is one line"
    return message.removeprefix(str(path))


def test_a_users_own_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SENTIMENT, encoding="utf-8")
    assert load_task(str(path)).answer.labels == ("good", "bad")


def test_a_task_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(UserError, match=r"'sentimant' is neither a file nor one of .*cqa.*svamp"):
        load_task("sentimant")


@pytest.mark.parametrize(
    ("right", "wrong", "key"),
    [("exemplars:", "exemplers:", "exemplers"), ("kind:", "kinds:", "answer.kinds"), ("label:", "lable:", "lable")],
)
def test_an_unknown_key_comes_with_the_nearest_name(tmp_path: Path, right: str, wrong: str, key: str) -> None:
    message = problem(tmp_path, SENTIMENT.replace(right, wrong))
    assert key in message
    assert f"did you mean {right.removesuffix(':')!r}?" in message


def test_an_unknown_key_like_no_other_comes_with_all_names(tmp_path: Path) -> None:
    assert "known keys are name, description, input" in problem(tmp_path, SENTIMENT + "zzz: 1")


def test_a_field_of_the_template_that_the_exemplars_lack(tmp_path: Path) -> None:
    message = problem(tmp_path, SENTIMENT.replace("{text}", "{txet}"))
    assert "exemplar 1 lacks txet, which `input` asks for" in message


def test_an_exemplar_whose_label_is_outside_the_set(tmp_path: Path) -> None:
    message = problem(tmp_path, SENTIMENT.replace("label: good", "label: fine"))
    assert "exemplar 1: label 'fine' is not one of good, bad" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is a mapping"),
        ("- a\n- b", "is a mapping"),
        ("name: [", "not readable as YAML"),
        (SENTIMENT.replace("name: sentiment", "name: senti ment"), "name"),
        (SENTIMENT.replace('input: "{text}"', 'input: "no column"'), "at least one {column}"),
        (SENTIMENT.replace('input: "{text}"', 'input: "{text"'), "expected '}'"),
        (SENTIMENT + "prompt: no place for it", "must hold {input}"),
        (SENTIMENT.replace("[good, bad]", "[yes, no]"), "answer.labels.0: input should be a valid string, not True"),
        (SENTIMENT.replace("[good, bad]", "[good]"), "two or more"),
        (SENTIMENT.replace("kind: choice", "kind: chioce"), "answer.kind"),
        (SENTIMENT + "hint: it is known", "`hint` must hold {label}"),
        (SENTIMENT.replace(WHY, "{short: a, full: c}"), "exemplars.0.rationale.medium: field required"),
        (SENTIMENT.replace(WHY, "{short: a, medum: b, full: c}"), "did you mean 'medium'?"),
        (SENTIMENT.replace(WHY, "3"), "exemplars.0.rationale.full: input should be a valid string, not 3"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(tmp_path, text)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match="not readable"):
        load_task(str(path))


@pytest.mark.parametrize(
    "answer",
    [
        {"kind": "choice"},
        {"kind": "choice", "labels": ["a", "a"]},
        {"kind": "text", "labels": ["a", "b"]},
        {"kind": "row_choice"},
        {"kind": "choice", "labels": ["a", "b"], "choices": "options"},
        {"kind": "choice", "labels": ["a", "b"], "values": {"0": "c"}},
        {"kind": "text", "sentence": "So the answer is label."},
    ],
)
def test_answers_that_contradict_themselves(answer: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Answer.model_validate(answer)


def test_braces_in_a_row_are_text() -> None:
    assert task().render({"text": "{text} {0} {{x}} %s"}) == "{text} {0} {{x}} %s"


def test_rendering_reads_only_the_columns_it_needs() -> None:
    assert task().render({"text": " hello\n", "other": object()}) == "hello"


def test_choices_are_lettered_lines_without_stray_space() -> None:
    row = {"question": "Where?", "choices": [" here ", "there"]}
    assert quiz().render(row) == "Where?\n(a) here\n(b) there"
    assert quiz().fields == ("question", "choices")


def test_choices_under_another_name() -> None:
    asked = quiz(answer={"kind": "row_choice", "choices": "options"})
    assert asked.render({"question": "Where?", "options": ["x", "y"]}) == "Where?\n(a) x\n(b) y"


@pytest.mark.parametrize("choices", ["here or there", ["here"], [], None, 3])
def test_choices_must_be_a_list_of_two_or_more(choices: object) -> None:
    with pytest.raises(ValueError, match="list of two or more"):
        quiz().render({"question": "Where?", "choices": choices})


@pytest.mark.parametrize("value", [None, "", "  ", math.nan])
def test_a_row_without_a_label_is_unlabelled(value: object) -> None:
    assert task().gold(value) is None


def test_gold_values_of_the_data_become_labels() -> None:
    coded = task(answer={"kind": "choice", "labels": ["good", "bad"], "values": {"0": "good", "1": "bad"}})
    assert [coded.gold(v) for v in (0, "1", "bad", " Good. ")] == ["good", "bad", "bad", "good"]
    with pytest.raises(ValueError, match="'-1' is not one of good, bad"):
        coded.gold(-1)


def test_gold_of_a_row_must_be_among_its_own_choices() -> None:
    assert quiz().gold("Here ", ["here", "there"]) == "here"
    with pytest.raises(ValueError, match="'where' is not one of here, there"):
        quiz().gold("where", ["here", "there"])


@pytest.mark.parametrize("text", ["CAFÉ\u00a0AU LAIT.", "cafe\u0301 au  lait", "\uff43af\u00e9 au lait"])
def test_labels_are_the_same_whatever_their_unicode_form(text: str) -> None:
    drinks = task(answer={"kind": "choice", "labels": ["café au lait", "tea"]})
    assert drinks.canonical(text) == "café au lait"
    assert drinks.same(text, "café au lait")


def test_expressions_are_the_same_when_their_values_are() -> None:
    sums = task(answer={"kind": "expression"})
    assert sums.same("( 84.0 / 2.0 )", "42")
    assert not sums.same("42", "43")
    assert not sums.same("1 / 0", "1 / 0"), "what has no value equals nothing"
    assert sums.canonical("forty-two") is None
    with pytest.raises(ValueError, match="an arithmetic expression"):
        sums.gold("import os")


@pytest.mark.parametrize(
    "kind", [{"kind": "choice", "labels": ["good", "bad"]}, {"kind": "expression"}, {"kind": "text"}]
)
def test_an_answer_that_could_not_be_read_equals_nothing(kind: dict[str, Any]) -> None:
    asked = task(answer=kind)
    assert not asked.same(None, None)
    assert not asked.same("1", None)


def test_row_ids_ignore_white_space_and_unicode_form_but_neither_case_nor_task() -> None:
    one = task()
    assert one.row_id("a  café\n") == one.row_id("a cafe\u0301")
    assert one.row_id("A café") != one.row_id("a café")
    assert one.row_id("a café") != task(name="other").row_id("a café")


def test_a_rationale_at_three_lengths(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        SENTIMENT.replace(WHY, "{short: Again., medium: Buy again., full: Would buy again.}"), encoding="utf-8"
    )
    read = load_task(str(path))
    lengths: tuple[Length, ...] = ("short", "medium", "full")
    assert [read.rationales(length) for length in lengths] == [["Again."], ["Buy again."], ["Would buy again."]]
    assert read == Task.model_validate(read.model_dump())


def test_a_rationale_in_full_alone_has_no_other_length(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SENTIMENT, encoding="utf-8")
    assert load_task(str(path)).rationales() == [WHY]
    with pytest.raises(UserError, match=r"task sentiment, exemplar 1: no medium rationale; give it as `rationale: {"):
        load_task(str(path)).rationales("medium")


@pytest.mark.parametrize(
    ("sentence", "around", "lead"),
    [
        ("So the answer is ({letter}) {label}.", ("So the answer is (", "."), "So the answer is"),
        ("\nAnswer: {label}", ("\nAnswer: ", ""), "Answer:"),
        ("\\boxed{{{label}}}", ("\\boxed{", "}"), "\\boxed{"),
        ("({label})", ("(", ")"), ""),
    ],
)
def test_what_stands_around_the_label(sentence: str, around: tuple[str, str], lead: str) -> None:
    answer = Answer(kind="text", sentence=sentence)
    assert (answer.around, answer.lead) == (around, lead)
