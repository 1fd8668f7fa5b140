from typing import Any

import pytest

from pipelines.curate import judge, vote
from pipelines.recipe import Curate
from pipelines.schema import REJECTED
from pipelines.tasks import Task

MOOD = Task.model_validate({"name": "mood", "input": "{text}", "answer": {"kind": "choice", "labels": ["good", "bad"]}})
QUIZ = Task.model_validate(
    {
        "name": "quiz",
        "input": "{question}\n{choices}",
        "answer": {"kind": "row_choice", "choices": "choices", "sentence": "So the answer is ({letter}) {label}."},
    }
)
SUM = Task.model_validate(
    {"name": "sum", "input": "{text}", "answer": {"kind": "expression", "sentence": "The answer is {label}."}}
)
ANSWER = "The sun shines today. So the answer is good."


def generation(text: str, finish_reason: str = "stop", error: str | None = None) -> dict[str, Any]:
    return {
        "row_id": "r",
        "split": "train",
        "sample": 0,
        "teacher": "t",
        "prompt_hash": "h",
        "text": text,
        "finish_reason": finish_reason,
        "error": error,
        "input_tokens": 5,
        "cached_tokens": 4,
        "output_tokens": 9,
    }


def judged(text: str, gold: str | None = None, task: Task = MOOD, **keys: Any) -> dict[str, Any]:
    row = generation(text, keys.pop("finish_reason", "stop"), keys.pop("error", None))
    return judge(task, Curate(**keys), row, ["bank", "train"] if task is QUIZ else None, gold)


def test_a_good_answer_is_accepted_with_all_it_came_with() -> None:
    made = judged(ANSWER, gold="good")
    assert made == generation(ANSWER) | {
        "rationale": "The sun shines today.",
        "label": "good",
        "agreement": None,
        "rationalized": False,
        "reason": None,
        "detail": None,
    }
    assert set(made) == set(REJECTED.names)


@pytest.mark.parametrize(
    ("row", "reason", "label", "detail"),
    [
        ({"text": "", "finish_reason": "error", "error": "too long"}, "engine_error", None, "too long"),
        ({"text": "The sun shines and", "finish_reason": "length"}, "truncated", None, "max_tokens"),
        ({"text": "So the answer is", "finish_reason": "length"}, "truncated", None, "max_tokens"),
        ({"text": "The sun shines."}, "unparsable", None, "So the answer is"),
        ({"text": ""}, "unparsable", None, "So the answer is"),
        ({"text": "The sun shines today. So the answer is grand."}, "label_not_in_set", None, "grand"),
        ({"text": "Sunny day. So the answer is good."}, "too_short", "good", "under 3 words"),
        ({"text": "So the answer is good."}, "too_short", "good", "under 3 words"),
        ({"text": ANSWER, "gold": "bad"}, "disagrees_with_gold", "good", "gold is 'bad'"),
    ],
)
def test_a_bad_answer_has_its_reason(row: dict[str, Any], reason: str, label: str | None, detail: str) -> None:
    made = judged(**row)
    assert (made["reason"], made["label"]) == (reason, label)
    assert detail in made["detail"]
    assert set(made) == set(REJECTED.names)


def test_a_prompt_beyond_the_context_is_told_apart_from_other_failures() -> None:
    made = judged("", finish_reason="too_long", error="the prompt has 9,000 tokens")
    assert (made["reason"], made["detail"]) == ("input_too_long", "the prompt has 9,000 tokens")


def test_a_rationale_may_be_too_long() -> None:
    made = judged(ANSWER, max_words=3)
    assert (made["reason"], made["detail"]) == ("too_long", "over 3 words")
    assert judged(ANSWER, max_words=4)["reason"] is None


def test_an_answer_is_no_reason() -> None:
    made = judged("The answer is good, good, good. So the answer is good.")
    assert (made["reason"], made["detail"]) == ("answer_leak", "it says the answer and no reason")


def test_a_thinking_part_is_stripped_or_is_the_rationale() -> None:
    text = "<think>The sun is out.</think>It is fine outside. So the answer is good."
    assert judged(text)["rationale"] == "It is fine outside."
    assert judged(text, thinking="rationale")["rationale"] == "The sun is out."


def hinted(text: str, **keys: Any) -> dict[str, Any]:
    return judge(MOOD, Curate(**keys), generation(text), None, "good", hinted=True)


def test_a_rationale_written_to_a_hint_needs_a_reason_of_its_own() -> None:
    assert hinted(ANSWER)["reason"] is None
    assert hinted(ANSWER)["rationalized"]
    made = hinted("The right answer is good, as it is said. So the answer is good.")
    assert (made["reason"], made["detail"]) == ("answer_leak", "it gives the hint as its reason")


def test_a_hint_that_is_not_taken_disagrees() -> None:
    text = "The rain pours down today. So the answer is bad."
    assert hinted(text)["reason"] == "disagrees_with_gold"
    assert hinted(text, on_disagree="keep")["reason"] == "disagrees_with_gold"


# votes


def said(*labels: str | None, task: Task = MOOD) -> list[dict[str, Any]]:
    """Samples of one row that say these labels; None is a text that can't be read."""
    sentence = task.answer.sentence
    texts = [f"Some reason for it. {sentence.format(label=label)}" if label else "Hm." for label in labels]
    return [judged(text, task=task) | {"sample": number} for number, text in enumerate(texts)]


def test_the_label_that_most_samples_say_wins() -> None:
    rows, label = vote(MOOD, said("bad", "good", "good", None), 0.0, gold=False)
    assert label == "good"
    assert [row["reason"] for row in rows] == ["outvoted", None, None, "unparsable"]
    assert [row["agreement"] for row in rows] == [
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        pytest.approx(2 / 3),
        None,
    ]


def test_of_labels_with_as_many_votes_the_first_wins() -> None:
    assert vote(MOOD, said("bad", "good"), 0.0, gold=False)[1] == "bad"


def test_too_little_agreement_outvotes_all() -> None:
    rows, label = vote(MOOD, said("bad", "good", "good"), 0.7, gold=False)
    assert label == "good"
    assert [row["reason"] for row in rows] == ["outvoted"] * 3
    assert rows[1]["detail"] == "only 67% of 3 samples agree"


def test_gold_stands_above_the_vote() -> None:
    samples = [
        judged(f"Some reason for it. So the answer is {label}.", gold="bad") for label in ("good", "good", "bad")
    ]
    rows, label = vote(MOOD, samples, 0.0, gold=True)
    assert label == "good"
    assert [row["reason"] for row in rows] == ["disagrees_with_gold", "disagrees_with_gold", None]


def test_expressions_vote_by_their_value() -> None:
    rows, label = vote(SUM, said("2 + 3", "4", "3 + 2", task=SUM), 0.0, gold=False)
    assert label == "2 + 3"
    assert [row["reason"] for row in rows] == [None, "outvoted", None]


def test_who_was_told_the_answer_has_no_vote() -> None:
    rows, label = vote(MOOD, [*said("bad"), hinted(ANSWER), hinted(ANSWER)], 0.0, gold=True)
    assert label == "bad"
    assert [row["agreement"] for row in rows] == [1.0, None, None]


def test_where_nothing_can_be_read_nothing_wins() -> None:
    assert vote(MOOD, said(None, None), 0.5, gold=False)[1] is None


def test_an_answer_given_before_the_cut_counts() -> None:
    made = judged(ANSWER + " And furthermore", gold="good", finish_reason="length")
    assert made["reason"] is None


def test_without_gold_nothing_disagrees() -> None:
    assert judged(ANSWER, gold=None)["reason"] is None


def test_disagreement_can_be_kept() -> None:
    made = judged(ANSWER, gold="bad", on_disagree="keep")
    assert (made["reason"], made["label"]) == (None, "good")


def test_the_shortest_length_is_the_users() -> None:
    assert judged(ANSWER, min_words=5)["reason"] == "too_short"
    assert judged("So the answer is good.", min_words=0)["reason"] is None


def test_answers_agree_by_what_they_mean() -> None:
    assert judged("Seven and three make ten. The answer is 7 + 3.", gold="(3 + 7)", task=SUM)["reason"] is None
    assert judged("Trains leave from there. So the answer is (b) Train.", gold="train", task=QUIZ)["reason"] is None
