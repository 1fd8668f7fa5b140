from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.prompts import (
    Style,
    answer_structure,
    chat_messages,
    completion,
    completion_prompt,
    prompt_hash,
    prompt_head,
    stop_strings,
)
from pipelines.tasks import Task
from pipelines.tasks.task import Length

PLACES = ["bank", "train", "train station", "café"]
SIGNS = ["c++", "(none) |", "a.b-c", "$5 [each]^", "back\\slash", "two\nlines", "{x}*", "图书馆 🧾"]


def task(answer: dict[str, Any], **keys: Any) -> Task:
    return Task.model_validate({"name": "t", "input": "{text}", "answer": answer} | keys)


POLICY = task({"kind": "choice", "labels": ["refund", "repair", "no refund"]})
PLACE = task(
    {"kind": "row_choice", "choices": "choices", "sentence": "So the answer is ({letter}) {label}."},
    input="{text}\n{choices}",
)
OWN_LINE = task({"kind": "choice", "labels": ["yes", "no"], "sentence": "\nAnswer: {label}"})
REPEATING = task({"kind": "choice", "labels": ["yes", "no"], "sentence": "tell that to the test: {label}!"})
SHOWN = task(
    {"kind": "choice", "labels": ["good", "bad"]},
    instruction="Judge.\n",
    exemplars=[{"input": {"text": "Fine {x}."}, "rationale": " It is fine. ", "label": "good"}],
)
FORMS = task(
    {"kind": "choice", "labels": ["good", "bad"]},
    exemplars=[
        {
            "input": {"text": "Fine."},
            "rationale": {"short": "Fine.", "medium": "It is fine.", "full": "They say that it is fine."},
            "label": "good",
        }
    ],
)


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


def test_every_form_of_the_prompt_has_a_hash_of_its_own() -> None:
    styles: tuple[Style, ...] = ("completion", "chat")
    lengths: tuple[Length, ...] = ("short", "medium", "full")
    forms = [(style, length, hinted) for style in styles for length in lengths for hinted in (False, True)]
    assert len({prompt_hash(FORMS, *form) for form in forms}) == len(forms)


def test_a_hint_changes_the_hash_where_no_exemplar_shows_it() -> None:
    hashes = {prompt_hash(POLICY, style, hinted=hinted) for style in ("completion", "chat") for hinted in (False, True)}
    reworded = POLICY.model_copy(update={"hint": "({label} is right.)"})
    assert len(hashes | {prompt_hash(reworded, hinted=True), prompt_hash(reworded, "chat", hinted=True)}) == 6
    assert prompt_hash(reworded) == prompt_hash(POLICY), "a hint that is not told changes nothing"


def test_what_a_chat_does_not_see_does_not_change_its_hash() -> None:
    other = SHOWN.model_copy(update={"prompt": "Text: {input}\nReasoning:"})
    assert prompt_hash(SHOWN, "chat") == prompt_hash(other, "chat")
    assert prompt_hash(SHOWN) != prompt_hash(other)


def test_the_exemplars_reason_at_the_length_that_was_asked_for() -> None:
    assert completion_prompt(FORMS, "Bad.", "short") == "Q: Fine.\nA: Fine. So the answer is good.\n\nQ: Bad.\nA:"
    assert "A: It is fine. So" in prompt_head(FORMS, "medium")
    assert prompt_head(FORMS) == prompt_head(FORMS, "full")


@pytest.mark.parametrize("render", [completion_prompt, chat_messages])
def test_a_length_that_the_exemplars_lack_is_a_mistake(render: Any) -> None:
    with pytest.raises(UserError, match=r"task t, exemplar 1: no short rationale; give it as `rationale: {short: …"):
        render(SHOWN, "Bad.", "short")


def test_a_hint_stands_on_a_line_of_its_own_after_every_input() -> None:
    prompt = completion_prompt(SHOWN, "Bad.", hint="bad")
    assert prompt == (
        "Judge.\n\nQ: Fine {x}.\n(The right answer is good.)\nA: It is fine. So the answer is good.\n\n"
        "Q: Bad.\n(The right answer is bad.)\nA:"
    )
    assert prompt.startswith(prompt_head(SHOWN, hinted=True))


def test_a_chat_is_the_same_in_turns() -> None:
    assert chat_messages(SHOWN, "Bad.", hint="bad") == (
        {"role": "system", "content": "Judge."},
        {"role": "user", "content": "Fine {x}.\n(The right answer is good.)"},
        {"role": "assistant", "content": "It is fine. So the answer is good."},
        {"role": "user", "content": "Bad.\n(The right answer is bad.)"},
    )


def test_a_chat_without_instruction_and_exemplars_is_one_turn() -> None:
    assert chat_messages(POLICY, "It broke.") == ({"role": "user", "content": "It broke."},)


def test_a_chat_shows_the_choices_and_the_letter() -> None:
    exemplar = {"input": {"text": "Money?", "choices": PLACES}, "rationale": "It is kept there.", "label": "bank"}
    _, answer, _ = chat_messages(task(PLACE.answer.model_dump(), input=PLACE.input, exemplars=[exemplar]), "x")
    assert answer["content"] == "It is kept there. So the answer is (a) bank."


@given(st.text(), st.text())
def test_any_input_and_any_hint_stand_in_a_chat_as_they_are(text: str, hint: str) -> None:
    assert chat_messages(SHOWN, text, hint=hint)[-1]["content"] == f"{text}\n(The right answer is {hint}.)"


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


def test_a_chat_ends_by_itself() -> None:
    assert stop_strings(POLICY, "chat") == []
    assert stop_strings(POLICY.model_copy(update={"stop": ("###",)}), "chat") == ["###"]


# the form of an answer


def has_form(structure: str, text: str) -> bool:
    """Whether the engine's own grammar takes a text as a whole."""
    import xgrammar

    signs = xgrammar.TokenizerInfo([bytes([n]) for n in range(256)] + [b"</s>"], stop_token_ids=[256])
    form = xgrammar.GrammarCompiler(signs, max_threads=1).compile_structural_tag(structure)
    matcher = xgrammar.GrammarMatcher(form)
    return matcher.accept_string(text) and matcher.accept_token(256)


@pytest.mark.parametrize(
    ("asked", "choices"),
    [(POLICY, None), (OWN_LINE, None), (REPEATING, None), (PLACE, PLACES), (PLACE, SIGNS)],
)
@pytest.mark.parametrize("rationale", ["It follows.", "Sober So Soon So the answer. So the", "", "注意！ 🧾 (b) Yes?"])
def test_what_a_teacher_should_write_has_the_form(
    asked: Task, choices: list[str] | None, rationale: str, capfd: pytest.CaptureFixture[str]
) -> None:
    structure = answer_structure(asked, choices)
    for label in choices or asked.answer.labels:
        written = completion(asked, rationale, label, choices)
        assert has_form(structure, written)
        assert rationale == "" or has_form(structure, written.removeprefix(" "))
        assert not has_form(structure, written + "x"), "nothing may follow"
    assert "arning" not in capfd.readouterr().err, "an escape that it does not know"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " It broke.",
        " It broke. So the answer is",
        " It broke. So the answer is exchange.",
        " It broke. So the answer is refund",
        " It broke. So the answer is refund.\n\nQ: And this?",
        " It broke. So the answer is refund. Or is it? So the answer is repair.",
        " It broke. So the answer is exchange. So the answer is repair.",
        " SSo the answer is exchange. So the answer is repair.",
        " It\nbroke. So the answer is refund.",
    ],
)
def test_no_other_text_has_the_form(text: str) -> None:
    assert not has_form(answer_structure(POLICY), text)


def test_the_form_holds_with_an_answer_that_no_words_announce() -> None:
    bare = task({"kind": "choice", "labels": ["yes", "no"], "sentence": "({label})"})
    assert has_form(answer_structure(bare), " (yes)")
    assert not has_form(answer_structure(bare), " Why not. (yes)"), "such an answer is read at the start alone"


@pytest.mark.parametrize("kind", ["expression", "text"])
def test_an_open_set_has_no_form(kind: str) -> None:
    with pytest.raises(UserError, match=rf"task t: teacher.constrain_answer needs a closed set .* its kind is {kind}"):
        answer_structure(task({"kind": kind}))


def test_a_row_without_its_choices_has_no_form() -> None:
    with pytest.raises(ValueError, match="needs the row's choices"):
        answer_structure(PLACE)
