"""Temperature, calibration error and threshold against what they should be by construction."""

import numpy as np
import pytest

from pipelines.calibration import calibration_error, choose_threshold, fit_temperature


def drawn(temperature: float, rows: int = 20_000) -> tuple[list[list[float]], list[int]]:
    """Probabilities that are too sure by that temperature, and answers drawn from the true ones."""
    dice = np.random.default_rng(0)
    logits = dice.normal(size=(rows, 4))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    right = (true.cumsum(axis=1) > dice.random((rows, 1))).argmax(axis=1)
    told = np.exp(logits * temperature)
    return (told / told.sum(axis=1, keepdims=True)).tolist(), right.tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_by_which_probabilities_are_too_sure(temperature: float) -> None:
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.05)


def test_rows_may_have_different_numbers_of_answers_and_probabilities_of_zero() -> None:
    assert 0.05 <= fit_temperature([[0.9, 0.1], [1.0, 0.0, 0.0], [0.4, 0.3, 0.3]], [0, 1, 0]) <= 20.0


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    assert calibration_error([0.8] * 10, [True] * 8 + [False] * 2, bins=1) == pytest.approx(0.0)
    assert calibration_error([0.9] * 10 + [0.5] * 10, [True] * 10 + [False] * 10, bins=2) == pytest.approx(0.3)


def test_scaling_brings_confidence_to_accuracy() -> None:
    probabilities, right = drawn(3.0)
    powers = np.asarray(probabilities) ** (1 / fit_temperature(probabilities, right))
    scaled = powers / powers.sum(axis=1, keepdims=True)
    hits = (np.asarray(right) == scaled.argmax(axis=1)).tolist()
    assert calibration_error(np.max(probabilities, axis=1).tolist(), hits) > 0.1
    assert calibration_error(scaled.max(axis=1).tolist(), hits) < 0.02


def test_the_threshold_answers_as_much_as_the_accuracy_allows() -> None:
    confidences = [0.9, 0.8, 0.7, 0.7, 0.6]
    right = [True, True, False, True, False]
    assert choose_threshold(confidences, right, 0.75) == 0.7
    assert choose_threshold(confidences, right, 1.0) == 0.8
    assert choose_threshold(confidences, right, 0.5) == 0.6
    assert choose_threshold([0.9, 0.5], [False, False], 0.5) is None
