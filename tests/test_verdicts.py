"""What the report's sentences say of outcomes whose answer is known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipelines.comparison import Interval, Score
from pipelines.recipe import Run
from pipelines.verdicts import (
    compare_to_teacher,
    judge_amount,
    judge_control,
    judge_labels,
    judge_rationales,
    judge_size,
)

RESAMPLES = 1000


def outcomes(right: int, rows: int = 100) -> np.ndarray[Any, Any]:
    """The first `right` rows right, the others wrong."""
    return np.arange(rows) < right


def score(right: Sequence[bool] | np.ndarray[Any, Any], examples: int = 100, **run: Any) -> Score:
    found = np.asarray(right, dtype=bool)
    measured = Interval(float(found.mean()), float(found.mean()) - 0.05, float(found.mean()) + 0.05)
    student = Run(**({"arm": "standard"} | run))
    return Score(student, found, measured, examples, 80 if student.arm == "step_by_step" else 0)


def pair(standard: int, step_by_step: int, rows: int = 100, **run: Any) -> list[Score]:
    return [
        score(outcomes(standard, rows), arm="standard", **run),
        score(outcomes(step_by_step, rows), arm="step_by_step", **run),
    ]


def test_helped() -> None:
    verdict = judge_rationales(pair(50, 62), RESAMPLES)
    assert verdict.effect == "helped"
    assert verdict.sentence.startswith(
        "Rationales helped here: with 100 gold labels, step_by_step is 12.0 points above standard (95 % interval +"
    )
    assert "With one seed a student" in verdict.sentence
    assert verdict.detail == ""


def test_hurt() -> None:
    verdict = judge_rationales(pair(62, 50), RESAMPLES)
    assert verdict.effect == "hurt"
    assert verdict.sentence.startswith("Rationales hurt here: with 100 gold labels, step_by_step is 12.0 points below")


def test_undecided() -> None:
    verdict = judge_rationales(pair(60, 61), RESAMPLES)
    assert verdict.effect == "undecided"
    assert "no difference here that the interval can tell apart from zero" in verdict.sentence
    assert "1.0 points above standard (95 % interval 0.0 to +3.0)" in verdict.sentence


def test_no_difference_at_all_is_undecided() -> None:
    verdict = judge_rationales(pair(60, 60), RESAMPLES)
    assert verdict.effect == "undecided"
    assert "level with standard (95 % interval 0.0 to 0.0)" in verdict.sentence


def test_one_arm_is_untested() -> None:
    verdict = judge_rationales([score(outcomes(60), arm="step_by_step")], RESAMPLES)
    assert (verdict.effect, verdict.difference) == ("untested", None)
    assert "not tested" in verdict.sentence


def test_seeds_that_disagree_make_it_undecided() -> None:
    """Each seed alone would be a clear effect."""
    scores = pair(50, 70, seed=0) + pair(60, 50, seed=1)
    verdict = judge_rationales(scores, RESAMPLES)
    assert verdict.effect == "undecided"
    assert "one seed" not in verdict.sentence


def test_several_comparisons_are_averaged_and_told_one_by_one() -> None:
    verdict = judge_rationales(pair(50, 70, fraction=0.5) + pair(70, 60) + pair(80, 80, labels="teacher"), RESAMPLES)
    assert verdict.difference is not None
    assert verdict.difference.mean == pytest.approx((0.2 - 0.1 + 0) / 3)
    assert "averaged over 3 comparisons" in verdict.sentence
    assert "helped in 1, hurt in 1 and can't be told apart from zero in 1 of 3" in verdict.detail


def test_teacher_labels_against_gold_take_the_most_of_each() -> None:
    scores = [
        score(outcomes(40), 25, fraction=0.25),
        score(outcomes(60), 100),
        score(outcomes(75), 1500, labels="teacher"),
        score(outcomes(70), 100, arm="step_by_step"),
        score(outcomes(70), 1500, arm="step_by_step", labels="teacher"),
    ]
    better, level = judge_labels(scores, RESAMPLES)
    assert better.startswith(
        "With 1,500 teacher labels standard is 15.0 points above what it reaches with 100 gold labels"
    )
    assert better.endswith("teacher labels did better.")
    assert "level with" in level
    assert level.endswith("which can't be told apart from zero.")


def test_gold_labels_alone_say_nothing_of_teacher_labels() -> None:
    assert judge_labels(pair(50, 60), RESAMPLES) == []


@pytest.mark.parametrize(
    ("teacher", "words"), [(0.9, "20.0 points below the teacher's 90.0 %"), (0.7, "level with the teacher's 70.0 %")]
)
def test_the_chosen_student_beside_the_teacher(teacher: float, words: str) -> None:
    sentence = compare_to_teacher(score(outcomes(70)), Interval(teacher, 0.6, 0.95))
    assert sentence.startswith("The chosen student is right on 70.0 % (65.0 to 75.0)")
    assert words in sentence


def curve(**accuracies: list[int]) -> list[Score]:
    """Students of each arm with a quarter, a half and all of 400 labels; right on so many of 100 rows."""
    return [
        score(outcomes(right), examples=round(400 * fraction), arm=arm, fraction=fraction)
        for arm, rights in accuracies.items()
        for fraction, right in zip((0.25, 0.5, 1.0), rights, strict=True)
    ]


def test_the_least_labels_that_reach_standard_with_all() -> None:
    (sentence,) = judge_amount(curve(standard=[40, 50, 60], step_by_step=[50, 65, 70]), RESAMPLES)
    assert sentence.startswith(
        "step_by_step reaches what standard does with all 400 gold labels (60.0 %) from 200 labels on, 50 % of them"
    )
    assert "5.0 points above that" in sentence


def test_an_amount_that_is_never_reached_is_said() -> None:
    (sentence,) = judge_amount(curve(standard=[40, 50, 60], step_by_step=[30, 40, 59]), RESAMPLES)
    assert sentence.startswith("At no amount tried")
    assert judge_amount(curve(standard=[40, 50, 60]), RESAMPLES) == []


def test_the_control_tells_whether_what_rationales_say_matters() -> None:
    helped = curve(step_by_step=[60, 70, 80], shuffled_rationale=[30, 40, 50])
    assert judge_control(helped, RESAMPLES).endswith("so what the rationales say matters.")
    assert "30.0 points above the control" in judge_control(helped, RESAMPLES)
    level = curve(step_by_step=[60, 70, 80], shuffled_rationale=[60, 70, 80])
    assert "may be owed to the second task alone" in judge_control(level, RESAMPLES)
    assert judge_control(curve(standard=[1, 2, 3], step_by_step=[1, 2, 3]), RESAMPLES) == ""


def test_each_teachers_rationales_are_held_against_standard_and_their_own_control() -> None:
    scores = [
        score(outcomes(50), arm="standard"),
        *(score(outcomes(right), arm="step_by_step", teacher=t) for t, right in (("t", 60), ("u", 70))),
        score(outcomes(65), arm="shuffled_rationale", teacher="u"),
    ]
    verdict = judge_rationales(scores, RESAMPLES)
    assert verdict.difference is not None
    assert verdict.difference.mean == pytest.approx(0.15)
    assert "5.0 points above the control" in judge_control(scores, RESAMPLES)


def test_the_smallest_student_beyond_its_teacher() -> None:
    teacher = Interval(0.7, 0.65, 0.75)
    sizes = {
        "large": (700, Interval(0.9, 0.8, 1.0), 100),
        "small": (60, Interval(0.75, 0.7, 0.8), 400),
        "small with less": (60, Interval(0.71, 0.7, 0.8), 200),
        "tiny": (5, Interval(0.69, 0.6, 0.8), 400),
    }
    assert "is small with less, with 60 parameters and 200 labels: 71.0 %" in judge_size(sizes, teacher)
    assert judge_size({"tiny": sizes["tiny"]}, teacher) == "No student is righter than the teacher (70.0 %)."
