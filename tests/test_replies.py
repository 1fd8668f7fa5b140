from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.prompts import completion
from pipelines.replies import cites_hint, only_answer, read_reply
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


def label(asked: Task, text: str) -> str | None:
    return read_reply(asked, text, PLACES if asked is PLACE else None).label


@pytest.mark.parametrize(
    ("asked", "answer"),
    [(POLICY, "no refund"), (PLACE, "café"), (SUM, "(3 + 4) * 2"), (TEXT, "42.5 km"), (OWN_LINE, "no")],
)
@pytest.mark.parametrize("rationale", ["It follows.", "First this\nand then that", "", "Is it {so}? \\1 (b) Yes"])
def test_a_completion_is_read_back(asked: Task, answer: str, rationale: str) -> None:
    written = completion(asked, rationale, answer, PLACES if asked is PLACE else None)
    reply = read_reply(asked, written, PLACES if asked is PLACE else None)
    assert (reply.rationale, reply.label, reply.reason) == (rationale, answer, None)


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


# a reasoning model


@pytest.mark.parametrize(
    "thinking_part",
    [
        "<think>\nFaulty? So the answer is repair.\n\nQ: Is it?\n</think>\n\n",
        "Faulty? So the answer is repair.</think>",  # the chat template wrote the opening
        "\n <think></think>",
        "<think>One.</think><think>Two: So the answer is repair.</think>",
    ],
)
def test_a_thinking_part_is_left_out(thinking_part: str) -> None:
    reply = read_reply(POLICY, thinking_part + "It broke. So the answer is refund.")
    assert (reply.rationale, reply.label) == ("It broke.", "refund")


@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_a_thinking_part_can_be_the_rationale(opening: str) -> None:
    text = f"{opening}It broke.\n\nQ: within 60 days? Yes.\n</think>\n\nSo the answer is refund."
    reply = read_reply(POLICY, text, thinking="rationale")
    assert (reply.rationale, reply.label) == ("It broke.\n\nQ: within 60 days? Yes.", "refund")
    assert read_reply(POLICY, text).rationale == ""


@pytest.mark.parametrize("thinking_part", ["", "<think>\n\n</think>\n\n"])
def test_without_a_thought_the_rationale_is_the_texts_own(thinking_part: str) -> None:
    reply = read_reply(POLICY, thinking_part + "It broke. So the answer is refund.", thinking="rationale")
    assert (reply.rationale, reply.label) == ("It broke.", "refund")


@pytest.mark.parametrize("thinking", ["strip", "rationale"])
@pytest.mark.parametrize("before", ["", "<think>First.</think> "])
def test_a_text_that_is_cut_while_thinking_has_no_answer(before: str, thinking: Any) -> None:
    reply = read_reply(POLICY, f"{before}<think>\nIt broke. So the answer is refund. But", thinking=thinking)
    assert (reply.label, reply.reason) == (None, Reason.UNPARSABLE)
    assert reply.detail == "the text ends within its thinking part"


def test_a_thought_without_an_answer_after_it_has_a_reason() -> None:
    reply = read_reply(POLICY, "<think>So the answer is refund.</think>It depends.", thinking="rationale")
    assert (reply.rationale, reply.label, reply.reason) == ("So the answer is refund.", None, Reason.UNPARSABLE)


def test_a_text_may_speak_of_the_tag() -> None:
    assert read_reply(POLICY, "They wrote <think> on it. So the answer is refund.").rationale.endswith("<think> on it.")


def test_a_chat_reply_may_hold_what_begins_an_exemplar() -> None:
    bare = task({"kind": "choice", "labels": ["yes", "no"]}, prompt="{input}\n", stop=["###"])
    text = "First.\n\nSecond. So the answer is yes. ### So the answer is no."
    assert read_reply(bare, text, style="chat").rationale == "First.\n\nSecond."
    assert read_reply(bare, text).reason is Reason.UNPARSABLE


# rationales that explain nothing


@pytest.mark.parametrize(
    "rationale",
    [
        "The right answer is refund.",
        "It says (The right answer is REFUND.), so that is it.",
        "Since the correct\nanswer is a refund, it must have been faulty.",
        "The given answer fits the policy.",
        "Because the answer given is refund, it was faulty.",
        "We are told that the answer is refund.",
        "As the hint says, the customer gets a refund.",
    ],
)
def test_a_rationale_that_cites_the_hint(rationale: str) -> None:
    assert cites_hint(POLICY, rationale, "refund")


def test_a_rationale_that_cites_a_hint_in_the_tasks_own_words() -> None:
    german = POLICY.model_copy(update={"hint": "(Richtig wäre: {label})"})
    assert cites_hint(german, "RICHTIG WA\u0308RE „refund“, also war es kaputt.", "refund")
    assert not cites_hint(german, "Richtig wäre auch ein Umtausch, aber refund geht vor.", "refund")


@pytest.mark.parametrize("hint", ["{label}", "({label})"])
def test_a_hint_of_the_label_alone_is_not_cited_by_naming_the_label(hint: str) -> None:
    assert not cites_hint(POLICY.model_copy(update={"hint": hint}), "It was faulty, so a refund is due.", "refund")


@pytest.mark.parametrize(
    "rationale",
    [
        "The lamp is faulty. Faulty items within 60 days get a refund, and a refund needs a receipt.",
        "The answer must be something that gives the money back. Of the choices, only a refund does.",
        "They were given a lamp and told that it works.",
        "The customer turned right and hinted at a fault.",
        "",
    ],
)
def test_a_rationale_with_a_reason_of_its_own(rationale: str) -> None:
    assert not cites_hint(POLICY, rationale, "refund")
    assert not only_answer(POLICY, rationale, "refund")


@pytest.mark.parametrize(
    ("asked", "rationale", "answer"),
    [
        (POLICY, "refund", "refund"),
        (POLICY, "It is a refund.", "refund"),
        (POLICY, "The answer is NO  REFUND! So, no refund.", "no refund"),
        (POLICY, "The answer is the answer, therefore refund.", "refund"),
        (PLACE, "(d) Cafe\u0301, the cafe\u0301.", "café"),
        (SUM, "337 - 23 = 314", "(337 - 23)"),
        (OWN_LINE, "\nAnswer: yes yes yes", "yes"),
    ],
)
def test_a_rationale_that_is_only_the_answer(asked: Task, rationale: str, answer: str) -> None:
    assert only_answer(asked, rationale, answer)


@pytest.mark.parametrize("rationale", ["", "!?", "It broke.", "Faulty, 21 days, refund.", "破れている"])
def test_a_short_rationale_is_not_only_the_answer(rationale: str) -> None:
    assert not only_answer(POLICY, rationale, "refund")


# huge texts


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "piece",
    [
        " ",
        "\n",
        "So ",
        "So the answer is ",
        "So the answer is (",
        "(a) ",
        "refund ",
        "<think>",
        "</think>",
        "\n\nQ",
        "e\u0301",
    ],
)
def test_a_huge_text_is_read(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    for asked in (POLICY, PLACE, SUM, TEXT, OWN_LINE):
        choices = PLACES if asked is PLACE else None
        reply = read_reply(asked, text, choices, thinking="rationale")
        assert (reply.label is None) == (reply.reason is not None)
        for judge in (cites_hint, only_answer):
            judge(asked, text, "refund")
    assert read_reply(POLICY, f"{text}</think>\n\nIt broke. So the answer is refund.").label == "refund"
