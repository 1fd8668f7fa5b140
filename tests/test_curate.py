from typing import Any

import pytest

from pipelines.curate import judge
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
