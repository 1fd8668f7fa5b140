"""The numbers of the report: accuracies over seeds, and paired differences.

Pure functions of 0/1 outcomes on the same rows in the same order. Accuracies and differences are shares in
[-1, 1].
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np

from pipelines.recipe import Arm, LabelSource, Run

Outcomes = np.ndarray[Any, Any]  # [students, rows] or [rows]; 1 right, 0 wrong, differences in between
Effect = Literal["helped", "hurt", "undecided", "untested"]

_BLOCK = 4_000_000  # numbers drawn at once by the bootstrap: 32 MB


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Score:
    """One student on the rows of the split."""

    run: Run
    right: Outcomes  # [rows]; every student of a comparison has the same rows in the same order
    accuracy: Interval
    examples: int  # labelled examples that it learnt from
    rationales: int  # how many of them came with a rationale


class Point(NamedTuple):
    """What students have in common that differ by their seed alone."""

    labels: LabelSource
    fraction: float
    model: str | None  # None: the recipe's
    teacher: str | None  # None: all, or the arm learns from none
    arm: Arm
    alpha: float | None  # None: the recipe's, or the arm has none

    @classmethod
    def of(cls, run: Run) -> Self:
        return cls(run.labels, run.fraction, run.model, run.teacher, run.arm, run.alpha)

    def standard(self) -> Self:
        """The point beside it that learns labels alone, and from gold labels so from no teacher."""
        return self._replace(arm="standard", alpha=None, teacher=None if self.labels == "gold" else self.teacher)


@dataclass(frozen=True)
class Cell:
    """The students that differ by their seed alone."""

    arm: Arm
    labels: LabelSource
    fraction: float
    alpha: float | None
    model: str | None
    teacher: str | None
    examples: int
    rationales: int  # mean over seeds, rounded: another seed draws other rows
    seeds: tuple[int, ...]
    accuracy: Interval
    gain: Interval | None  # over standard with the same labels, fraction, model and seeds; None where there is none


@dataclass(frozen=True)
class Tried:
    """Students that differ by their seed alone, as they stood when an alpha was chosen."""

    point: Point
    scores: tuple[float, ...]  # the best on validation so far, of each seed
    stopped: int  # of them, before their last step
    chosen: bool

    @property
    def alpha(self) -> float:
        return self.point.alpha or 0.0

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))


def by_alpha(trials: Sequence[Mapping[str, Any]]) -> list[Tried]:
    """Students by alpha, where there is more than one alpha to compare.

    Args:
        trials: rows of `schema.TRIALS`.
    """
    groups: dict[Point, list[Mapping[str, Any]]] = {}
    for trial in trials:
        if trial["alpha"] is not None and trial["score"] is not None:
            groups.setdefault(Point(*(trial[name] for name in Point._fields)), []).append(trial)
    rivals = Counter(point._replace(alpha=None) for point in groups)
    return [
        Tried(
            point,
            tuple(trial["score"] for trial in group),
            sum(trial["state"] == "stopped" for trial in group),
            bool(group[0]["chosen"]),
        )
        for point, group in groups.items()
        if rivals[point._replace(alpha=None)] > 1
    ]


def summarise(scores: Sequence[Score], resamples: int) -> list[Cell]:
    """Students that differ by their seed alone, as one; ordered by labels, fraction, model, arm."""
    groups = by_point(scores)
    cells = []
    for point, group in groups.items():
        partner = [] if point.arm == "standard" else groups.get(point.standard(), [])
        paired = paired_outcomes(group, partner)
        cells.append(
            Cell(
                **point._asdict(),
                examples=round(float(np.mean([s.examples for s in group]))),
                rationales=round(float(np.mean([s.rationales for s in group]))),
                seeds=tuple(s.run.seed for s in group),
                accuracy=accuracy_of(group, resamples),
                gain=None if paired is None else bootstrap([paired], resamples),
            )
        )
    return cells


def effect_of(difference: Interval) -> Effect:
    """What an interval of a difference says about its sign."""
    return "helped" if difference.low > 0 else "hurt" if difference.high < 0 else "undecided"


def wilson(accuracy: float, rows: int) -> Interval:
    """Wilson's 95 % interval of a share of `rows`: for the teacher, of whom only the count is known."""
    pull = NormalDist().inv_cdf(0.975) ** 2 / rows
    middle = accuracy + pull / 2
    reach = (pull * (accuracy * (1 - accuracy) + pull / 4)) ** 0.5
    return Interval(accuracy, max(0.0, (middle - reach) / (1 + pull)), min(1.0, (middle + reach) / (1 + pull)))


def bootstrap(groups: Sequence[Outcomes], resamples: int, seed: int = 0) -> Interval:
    """The mean over groups of the mean over seeds and rows, with its percentile interval.

    Each resample draws rows, and within each group seeds, with replacement, apart from each other, as every
    seed is scored on every row (the pigeonhole bootstrap, Owen 2007, doi 10.1214/07-AOAS122). Of n seeds it draws
    n - 1, so that the variance of a mean over few seeds is not understated by (n - 1) / n (Rao & Wu 1988);
    with one seed only the rows vary. Rows are drawn for all groups together, since what is hard for one is
    hard for all; so are seeds where groups have as many. Rows on which all students do alike are
    interchangeable: their counts are drawn, not the rows, so the memory does not grow with the split.

    Args:
        groups: each [seeds, rows], all with the same rows in the same order.
        resamples: how many.
        seed: of the draws.
    """
    patterns, counts = np.unique(np.concatenate(groups).astype(np.int8), axis=1, return_counts=True)
    rows = int(counts.sum())
    shares = np.concatenate([np.full(len(group), 1 / len(group)) for group in groups]) / len(groups)
    mean = float(shares @ patterns @ counts) / rows
    rng = np.random.default_rng(seed)
    at_once = max(1, _BLOCK // len(counts))
    means = []
    for done in range(0, resamples, at_once):
        size = min(at_once, resamples - done)
        drawn_rows = rng.multinomial(rows, counts / rows, size=size)  # [size, patterns]
        uniform = rng.random((size, max(len(group) for group in groups)))
        weights = np.concatenate([_drawn_shares(uniform, len(group)) for group in groups], axis=1) / len(groups)
        means.append(np.einsum("rp,rp->r", drawn_rows, weights @ patterns) / rows)
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    # thirds don't add up exactly: without rounding, an end that is zero could pass for an effect
    return Interval(*(float(np.round(value, 12)) + 0.0 for value in (mean, low, high)))


def percent(share: float) -> str:
    """`81.2` of 0.8123."""
    return f"{100 * share:.1f}"


def signed(share: float) -> str:
    """`+1.2` of 0.0123, with a true minus sign; what rounds to nothing has no sign."""
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def by_point(scores: Sequence[Score]) -> dict[Point, list[Score]]:
    """Students by what they have in common, in the order of their seeds; gold first, small first, arms in order."""
    arms = get_args(Arm)

    def place(score: Score) -> tuple[object, ...]:
        point = Point.of(score.run)
        return (
            point.labels,
            point.fraction,
            point.model or "",
            point.teacher or "",
            arms.index(point.arm),
            point.alpha or 0.0,
        )

    ordered = sorted(scores, key=lambda score: (place(score), score.run.seed))
    return {point: list(group) for point, group in itertools.groupby(ordered, lambda score: Point.of(score.run))}


def accuracy_of(group: Sequence[Score], resamples: int) -> Interval:
    """Of one seed as it was measured at its evaluation, so that no number stands twice with different ends."""
    return group[0].accuracy if len(group) == 1 else bootstrap([_outcomes(group)], resamples)


def _outcomes(group: Sequence[Score]) -> Outcomes:
    return np.stack([score.right for score in group]).astype(np.int8)


def paired_outcomes(group: Sequence[Score], baseline: Sequence[Score]) -> Outcomes | None:
    """Differences [seeds, rows] over the seeds that both have; None when they share none."""
    theirs = {score.run.seed: score for score in baseline}
    mine = [score for score in group if score.run.seed in theirs]
    if not mine:
        return None
    return _outcomes(mine) - _outcomes([theirs[score.run.seed] for score in mine])


def _drawn_shares(uniform: Outcomes, seeds: int) -> Outcomes:
    """[resamples, at least seeds - 1] uniform numbers → [resamples, seeds], the share that each seed gets."""
    drawn = (uniform[:, : max(1, seeds - 1)] * seeds).astype(np.int64)
    return np.asarray((drawn[:, :, None] == np.arange(seeds)).mean(axis=1))
