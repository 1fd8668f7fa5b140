from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.prompts import completion, completion_prompt, prompt_hash, prompt_head, read_reply, stop_strings
from pipelines.schema import Reason
from pipelines.tasks import Task

PLACES = ["bank", "train", "train station", "café"]


def task(answer: dict[str, Any], **keys: Any) -> Task:
    return Task.model_validate({"name": "t", "input": "{text}", "answer": answer} | keys)


POLICY = task({"kind": "choice", "labels": ["refund", "repair", "no refund"]})
PLACE = task(
    {"kind": "row_choice", "choices": "choices", "sentence": "So the answer is ({letter}) {label}."},
    input="{text}\n{choices}",
)
SUM = task({"kind": "expression", "sentence": "The answer is {label}."})
TEXT = task({"kind": "text", "sentence": "Answer: {label}."})
OWN_LINE = task({"kind": "choice", "labels": ["yes", "no"], "sentence": "\nAnswer: {label}"})
SHOWN = task(
    {"kind": "choice", "labels": ["good", "bad"]},
    instruction="Judge.\n",
    exemplars=[{"input": {"text": "Fine {x}."}, "rationale": " It is fine. ", "label": "good"}],
)


def label(asked: Task, text: str) -> str | None:
    return read_reply(asked, text, PLACES if asked is PLACE else None).label


# prompts


def test_the_input_comes_last_so_that_prompts_share_their_head() -> None:
    prompt = completion_prompt(SHOWN, "Bad.")
    assert prompt == "Judge.\n\nQ: Fine {x}.\nA: It is fine. So the answer is good.\n\nQ: Bad.\nA:"
    assert prompt.startswith(prompt_head(SHOWN))


def test_a_task_without_exemplars_is_asked_plainly() -> None:
    assert completion_prompt(POLICY, "It broke.") == "Q: It broke.\nA:"


@given(st.text())
def test_any_input_stands_in_the_prompt_as_it_is(text: str) -> None:
    assert completion_prompt(SHOWN, text) == prompt_head(SHOWN) + f"Q: {text}\nA:"


def test_the_hash_changes_with_what_the_teacher_sees() -> None:
    other = SHOWN.model_copy(update={"instruction": "Judge well."})
    assert prompt_hash(SHOWN) == prompt_hash(SHOWN.model_copy()) != prompt_hash(other)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [(POLICY, "no refund"), (PLACE, "café"), (SUM, "(3 + 4) * 2"), (TEXT, "42.5 km"), (OWN_LINE, "no")],
)
@pytest.mark.parametrize("rationale", ["It follows.", "First this\nand then that", "", "Is it {so}? \\1 (b) Yes"])
def test_a_completion_is_read_back(asked: Task, answer: str, rationale: str) -> None:
    written = completion(asked, rationale, answer, PLACES if asked is PLACE else None)
    reply = read_reply(asked, written, PLACES if asked is PLACE else None)
    assert (reply.rationale, reply.label, reply.reason) == (rationale, answer, None)


# where a text stops


@pytest.mark.parametrize(
    ("keys", "stop"),
    [
        ({}, "\n\nQ:"),
        ({"prompt": "Message: {input}\nReasoning:"}, "\n\nMessage:"),
        ({"prompt": "{input}\nReasoning:", "input": "Premise: {p}\nHypothesis: {h}"}, "\n\nPremise:"),
        ({"prompt": "{input}\nReasoning:"}, "\n\n"),
    ],
)
def test_the_next_exemplar_is_known_by_how_exemplars_begin(keys: dict[str, Any], stop: str) -> None:
    assert stop_strings(task({"kind": "text"}, **keys)) == [stop]


@pytest.mark.parametrize(
    "run_on",
    [
        "\n\nQ: And this?\nA: No. So the answer is repair.",
        "\n\nQ: What is",
        "\n\n\nQ: So the answer is repair.",
        " \n\nQ:",
    ],
)
def test_a_made_up_next_exemplar_is_cut_off(run_on: str) -> None:
    reply = read_reply(POLICY, "It broke. So the answer is refund." + run_on)
    assert (reply.rationale, reply.label) == ("It broke.", "refund")


@pytest.mark.parametrize(
    "text", ["\n\nQ: And this?\nA: So the answer is refund.", " It broke.\n\nQ: So the answer is refund."]
)
def test_the_answer_to_a_made_up_exemplar_is_not_an_answer(text: str) -> None:
    assert read_reply(POLICY, text).reason is Reason.UNPARSABLE


def test_an_empty_line_within_a_rationale_ends_nothing_when_exemplars_have_an_opening() -> None:
    assert read_reply(POLICY, "One.\n\nTwo. So the answer is refund.").rationale == "One.\n\nTwo."


def test_without_an_opening_an_empty_line_ends_the_text_but_not_before_it_began() -> None:
    bare = task({"kind": "choice", "labels": ["yes", "no"]}, prompt="{input}\n")
    assert label(bare, "\n\n Why not. So the answer is yes.\n\nSo the answer is no.") == "yes"


def test_a_task_may_name_more_stop_strings() -> None:
    stopped = task({"kind": "choice", "labels": ["yes", "no"]}, stop=["###"])
    assert read_reply(stopped, "Why not. ### So the answer is yes.").reason is Reason.UNPARSABLE


# reading the answer


def test_without_the_answer_sentence_a_text_is_unparsable_and_says_what_was_looked_for() -> None:
    reply = read_reply(POLICY, "It broke, and a refund is")
    assert (reply.label, reply.reason, reply.rationale) == (None, Reason.UNPARSABLE, "It broke, and a refund is")
    assert reply.detail == "no 'So the answer is' in the text"


@pytest.mark.parametrize("text", ["", " ", "\n", "So the answer is", "So the answer is ."])
def test_an_empty_answer_is_no_label(text: str) -> None:
    assert read_reply(POLICY, text).label is None
    assert read_reply(SUM, text).reason is Reason.UNPARSABLE


@pytest.mark.parametrize("answer", ["exchange", "refunded", "not refund", "either refund or repair", "re fund"])
def test_a_label_outside_the_set_is_shown(answer: str) -> None:
    reply = read_reply(POLICY, f"It broke. So the answer is {answer}.")
    assert (reply.label, reply.reason) == (None, Reason.LABEL_NOT_IN_SET)
    assert answer in reply.detail


def test_the_detail_of_a_strange_answer_stays_short() -> None:
    assert len(read_reply(POLICY, "So the answer is " + "very " * 1000).detail) < 100


@pytest.mark.parametrize(
    "text",
    [
        "It broke. So the answer is refund.",
        "It broke, so  the\nanswer is Refund",
        "It broke. So the answer is: **refund**.",
        "It broke. So the answer is “REFUND”",
        "It broke. So the answer is ｒｅｆｕｎｄ.",  # full-width letters
        "It broke. So the answer is refund. A repair would be too dear.",
    ],
)
def test_spellings_of_an_answer(text: str) -> None:
    assert label(POLICY, text) == "refund"


def test_the_longest_label_wins() -> None:
    assert label(POLICY, "So the answer is no refund.") == "no refund"


def test_words_that_only_end_like_the_answer_sentence_do_not_count() -> None:
    assert read_reply(POLICY, "Also the answer is refund.").reason is Reason.UNPARSABLE


@pytest.mark.parametrize("before", ["they are brothers.\n", "they are brothers\n", "they are brothers. "])
def test_an_answer_on_a_line_of_its_own_needs_no_full_stop_before_it(before: str) -> None:
    assert label(OWN_LINE, f"{before}Answer: yes\n\nQ: x\nA: y\nAnswer: no") == "yes"


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("(b) train.", "train"),
        ("(c) train station.", "train station"),
        ("(C) Train Station", "train station"),
        ("b) train", "train"),
        ("(b).", "train"),
        ("(b", None),
        ("**(a) bank**.", "bank"),
        ("train station.", "train station"),
        ("(a) the river bank.", "bank"),  # the letter alone can be read
        ("(d) cafe\u0301.", "café"),  # in another unicode form
        ("(z) bank.", "bank"),  # the words alone can be read
        ("(z) river.", None),
        ("(\u017f) bank.", None),  # the long s is a letter, but not of the list
        ("(a) train.", None),  # letter and words contradict each other
        ("(b) train station.", None),
        ("(a) bank or (b) train.", None),  # two choices are none
        ("either (a) bank or (b) train.", None),
        ("(a) bank. Neither (b) nor (c) has money.", "bank"),
        ("river.", None),
    ],
)
def test_a_choice_of_the_row(answer: str, chosen: str | None) -> None:
    reply = read_reply(PLACE, f"Money is kept there. So the answer is {answer}", PLACES)
    assert reply.label == chosen
    assert (reply.reason is None) == (chosen is not None)


def test_choices_with_the_signs_of_regular_expressions() -> None:
    signs = ["c++", "(none)", "a.b", "$5 [each]"]
    for letter, sign in zip("abcd", signs, strict=True):
        assert read_reply(PLACE, f"So the answer is ({letter}) {sign}.", signs).label == sign


@pytest.mark.parametrize(
    ("answer", "equation"),
    [
        ("(84 / 2).", "(84 / 2)"),
        ("(102 * 11) - 8.\n\nQ: 3 - 1?", "(102 * 11) - 8"),
        ("42", "42"),
        ("84 / 2 = 42.", "84 / 2"),
    ],
)
def test_an_equation(answer: str, equation: str) -> None:
    assert label(SUM, f"Halve it. The answer is {answer}") == equation


@pytest.mark.parametrize(
    "answer", ["(25 + x).", "(84 / 0).", "(9 + 6", "forty-two.", "((1 and 2)).", "9" * 400, "(" * 400]
)
def test_an_answer_that_is_no_arithmetic_is_unparsable(answer: str) -> None:
    assert read_reply(SUM, f"Hm. The answer is {answer}").reason is Reason.UNPARSABLE


def test_literal_braces_in_the_answer_sentence() -> None:
    boxed = task({"kind": "expression", "sentence": "\\boxed{{{label}}}"})
    assert completion(boxed, "Add.", "3 + 4") == " Add. \\boxed{3 + 4}"
    assert label(boxed, "Add. \\boxed{3 + 4}") == "3 + 4"


@pytest.mark.parametrize(
    ("answer", "read"), [("Paris.", "Paris"), ("St. Ives.\nMore.", "St. Ives"), ("Paris", "Paris"), (".", None)]
)
def test_a_text_answer_is_the_rest_of_its_line(answer: str, read: str | None) -> None:
    assert label(TEXT, f"It is the capital. Answer: {answer}") == read


@given(
    st.text()
    | st.lists(st.sampled_from(["So the answer is", "(a)", " bank", "train", "\n\nQ:", "(", "1", "/0"])).map("".join)
)
def test_any_text_is_read_without_an_exception_as_either_a_label_or_a_reason(text: str) -> None:
    for asked in (POLICY, PLACE, SUM, TEXT, OWN_LINE):
        reply = read_reply(asked, text, PLACES if asked is PLACE else None)
        assert (reply.label is None) == (reply.reason is not None)
