from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipelines.comparison import (
    Interval,
    Score,
    bootstrap,
    by_alpha,
    effect_of,
    percent,
    signed,
    summarise,
    wilson,
)
from pipelines.recipe import Run

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


# bootstrap


def test_one_student_gets_the_binomial_interval() -> None:
    found = bootstrap([outcomes(80, 400)[None]], 20_000)
    low, high = 65 / 400, 96 / 400  # quantiles of Binomial(400, 0.2): what the percentile bootstrap converges to
    assert found.mean == 0.2
    assert found.low == pytest.approx(low, abs=0.003)
    assert found.high == pytest.approx(high, abs=0.003)


@pytest.mark.parametrize(("right", "mean"), [(100, 1.0), (0, 0.0)])
def test_where_nothing_varies_the_interval_is_a_point(right: int, mean: float) -> None:
    assert bootstrap([np.stack([outcomes(right)] * 3)], RESAMPLES) == (mean, mean, mean)


def test_the_order_of_rows_does_not_matter() -> None:
    rows = np.random.default_rng(1).random((3, 50)) < 0.7
    assert bootstrap([rows], RESAMPLES) == bootstrap([rows[:, ::-1]], RESAMPLES)


def test_seeds_are_drawn_too() -> None:
    same, apart = np.stack([outcomes(70)] * 2), np.stack([outcomes(50), outcomes(90)])
    narrow, wide = bootstrap([same], RESAMPLES), bootstrap([apart], RESAMPLES)
    assert narrow.mean == wide.mean == 0.7
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_the_variance_between_two_seeds_is_not_understated() -> None:
    """Rows don't vary here, so only seeds do: drawing 2 of 2 would give half of s²/2."""
    seeds = np.stack([outcomes(0), outcomes(100)])
    assert bootstrap([seeds], RESAMPLES) == (0.5, 0.0, 1.0)


def test_groups_count_alike_however_many_seeds_they_have() -> None:
    assert bootstrap([np.stack([outcomes(40)] * 3), outcomes(80)[None]], RESAMPLES).mean == 0.6


def test_an_end_that_is_zero_is_exactly_zero() -> None:
    """Thirds don't add up exactly; 1e-17 above zero would pass for an effect."""
    nothing = np.zeros((3, 90), dtype=np.int8)
    nothing[0, 0], nothing[1, 0] = 1, -1
    assert bootstrap([nothing, nothing, nothing], RESAMPLES).mean == 0.0
    assert effect_of(bootstrap([nothing[2:]], RESAMPLES)) == "undecided"


def test_memory_does_not_grow_with_rows() -> None:
    found = bootstrap([(np.random.default_rng(0).random((1, 500_000)) < 0.8)], RESAMPLES)
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 500_000) ** 0.5, rel=0.1)


# summarise


def test_cells_are_grouped_by_all_but_the_seed_and_ordered() -> None:
    scores = [
        score(outcomes(60), arm="step_by_step", labels="teacher", examples=900),
        score(outcomes(50), arm="step_by_step", fraction=0.5, examples=50),
        score(outcomes(52), arm="step_by_step", fraction=0.5, seed=1, examples=50),
        score(outcomes(70), arm="standard"),
        score(outcomes(40), arm="standard", fraction=0.5, examples=50),
    ]
    cells = summarise(scores, RESAMPLES)
    assert [(c.labels, c.fraction, c.arm, c.seeds, c.examples) for c in cells] == [
        ("gold", 0.5, "standard", (0,), 50),
        ("gold", 0.5, "step_by_step", (0, 1), 50),
        ("gold", 1.0, "standard", (0,), 100),
        ("teacher", 1.0, "step_by_step", (0,), 900),
    ]
    assert [c.accuracy.mean for c in cells] == pytest.approx([0.4, 0.51, 0.7, 0.6])


def test_one_seed_keeps_the_interval_of_its_evaluation() -> None:
    assert summarise([score(outcomes(70))], RESAMPLES)[0].accuracy == pytest.approx((0.7, 0.65, 0.75))


def test_gain_is_over_standard_with_the_same_labels_and_fraction() -> None:
    cells = summarise(
        pair(60, 70) + pair(30, 35, fraction=0.25) + [score(outcomes(9), arm="step_by_step", labels="teacher")],
        RESAMPLES,
    )
    gains = {(c.labels, c.fraction, c.arm): c.gain for c in cells}
    small, large = gains["gold", 0.25, "step_by_step"], gains["gold", 1.0, "step_by_step"]
    assert small is not None
    assert large is not None
    assert (small.mean, large.mean) == (0.05, 0.1)
    assert gains["gold", 1.0, "standard"] is None
    assert gains["teacher", 1.0, "step_by_step"] is None


def test_gain_is_paired_by_row() -> None:
    """Ten rows gained and none lost: much narrower than two accuracies of 100 rows, whose interval would hold zero."""
    gain = summarise(pair(50, 60), RESAMPLES)[1].gain
    assert gain is not None
    assert gain.mean == 0.1
    assert 0.03 < gain.low < 0.06
    assert 0.14 < gain.high < 0.18


def test_gain_is_over_the_seeds_that_both_have() -> None:
    scores = [
        score(outcomes(50), arm="standard", seed=1),
        score(outcomes(90), arm="step_by_step", seed=0),
        score(outcomes(56), arm="step_by_step", seed=1),
    ]
    gain = summarise(scores, RESAMPLES)[1].gain
    assert gain is not None
    assert gain.mean == 0.06
    assert summarise(scores[:2], RESAMPLES)[1].gain is None


# small things


def test_wilson() -> None:
    assert wilson(0.5, 20) == pytest.approx((0.5, 0.2993, 0.7007), abs=1e-4)
    assert wilson(1.0, 10).high == 1.0
    assert wilson(1.0, 10).low == pytest.approx(0.7225, abs=1e-4)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0123, "+1.2"), (-0.0123, "−1.2"), (0.0, "0.0"), (-0.0004, "0.0"), (0.0004, "0.0"), (1, "+100.0")],
)
def test_signed(share: float, text: str) -> None:
    assert signed(share) == text


def test_percent() -> None:
    assert percent(0.8123) == "81.2"


def trial(score: float | None, **keys: Any) -> dict[str, Any]:
    run = Run.model_validate({"arm": "step_by_step", "alpha": 0.5} | {k: v for k, v in keys.items() if k != "state"})
    return {**run.model_dump(), "score": score, "state": keys.get("state", "done"), "chosen": False}


def test_alphas_are_means_over_seeds_where_there_is_more_than_one() -> None:
    trials = [
        trial(0.6, alpha=0.25, seed=0),
        trial(0.5, alpha=0.25, seed=1, state="stopped"),
        trial(0.8, alpha=0.75),
        trial(None, alpha=0.75, seed=1, state="failed"),
        trial(0.9, alpha=0.5, fraction=0.5),
        trial(0.4, arm="standard", alpha=None),
    ]
    low, high = by_alpha(trials)
    assert (low.alpha, low.scores, low.stopped) == (0.25, (0.6, 0.5), 1)
    assert low.mean == pytest.approx(0.55)
    assert (high.alpha, high.scores, high.stopped) == (0.75, (0.8,), 0)
