"""Macro-F1, confusion, calibration, coverage: against numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.metrics import INVALID, calibrate, classify, cover


def test_macro_f1_is_the_mean_over_labels_however_rare() -> None:
    made = classify(["a", "a", "a", "b"], ["a", "a", "b", "b"], ["a", "b"])
    assert made["macro_f1"] == pytest.approx((2 * 1.0 * 2 / 3 / (1 + 2 / 3) + 2 * 0.5 * 1 / 1.5) / 2)
    assert made["confusion"] == {"labels": ["a", "b"], "matrix": [[2, 1], [0, 1]]}


def test_a_label_that_is_never_right_counts_as_nothing() -> None:
    assert classify(["a", "b"], ["a", "a"], ["a", "b", "c"])["macro_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)


def test_what_is_no_answer_is_wrong_and_has_a_column_of_its_own() -> None:
    made = classify(["a", "b"], [None, "b"], ["a", "b"])
    assert made["confusion"] == {"labels": ["a", "b", INVALID], "matrix": [[0, 0, 1], [0, 1, 0]]}
    assert made["macro_f1"] == pytest.approx(0.5)


def test_calibration_error_by_hand() -> None:
    made = calibrate([1, 1, 0, 0], [0.95, 0.85, 0.85, 0.35])
    assert made["bins"] == [
        {"confidence": pytest.approx(0.35), "accuracy": 0.0, "rows": 1},
        {"confidence": pytest.approx(0.85), "accuracy": 0.5, "rows": 2},
        {"confidence": pytest.approx(0.95), "accuracy": 1.0, "rows": 1},
    ]
    assert made["ece"] == pytest.approx((0.35 + 2 * 0.35 + 0.05) / 4)


def test_full_confidence_has_a_bin() -> None:
    assert calibrate([1], [1.0]) == {"ece": 0.0, "bins": [{"confidence": 1.0, "accuracy": 1.0, "rows": 1}]}


def test_one_who_is_as_often_right_as_sure_is_calibrated() -> None:
    dice = np.random.default_rng(0)
    confidence = dice.uniform(size=200_000)
    assert calibrate(dice.uniform(size=200_000) < confidence, confidence)["ece"] < 0.01


def test_abstaining_from_the_unsure_by_hand() -> None:
    made = cover([1, 0, 1, 0], [0.9, 0.3, 0.8, 0.6])
    assert [(p["coverage"], p["threshold"], p["accuracy"]) for p in made] == [
        (1.0, 0.3, 0.5),
        (0.75, 0.6, pytest.approx(2 / 3)),
        (0.5, 0.8, 1.0),
        (0.25, 0.9, 1.0),
    ]


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=60))
def test_all_rows_are_covered_and_their_accuracy_is_the_accuracy(rows: list[tuple[bool, float]]) -> None:
    correct, confidence = zip(*rows, strict=True)
    made = cover(correct, confidence)
    assert made[0]["coverage"] == 1.0
    assert made[0]["accuracy"] == pytest.approx(sum(correct) / len(correct))
    assert 0 <= calibrate(correct, confidence)["ece"] <= 1
