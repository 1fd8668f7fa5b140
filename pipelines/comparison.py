"""The numbers of the report: accuracies over seeds, paired differences, and what they say in words.

Pure functions of 0/1 outcomes on the same rows in the same order. Accuracies and differences are shares in
[-1, 1]; sentences speak of percentage points.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np

from pipelines.recipe import Arm, LabelSource, Run

Outcomes = np.ndarray[Any, Any]  # [students, rows] or [rows]; 1 right, 0 wrong, differences in between
Effect = Literal["helped", "hurt", "undecided", "untested"]

_CONTROL: Arm = "shuffled_rationale"
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
    arm: Arm
    alpha: float | None  # None: the recipe's, or the arm has none

    @classmethod
    def of(cls, run: Run) -> Self:
        return cls(run.labels, run.fraction, run.model, run.arm, run.alpha)

    def under(self, arm: Arm) -> Self:
        """The point beside it that has no alpha of its own."""
        return self._replace(arm=arm, alpha=None)


@dataclass(frozen=True)
class Cell:
    """The students that differ by their seed alone."""

    arm: Arm
    labels: LabelSource
    fraction: float
    alpha: float | None
    model: str | None
    examples: int
    rationales: int  # mean over seeds, rounded: another seed draws other rows
    seeds: tuple[int, ...]
    accuracy: Interval
    gain: Interval | None  # over standard with the same labels, fraction, model and seeds; None where there is none


@dataclass(frozen=True)
class Verdict:
    """Whether rationales helped."""

    effect: Effect
    difference: Interval | None  # step_by_step minus standard, averaged over all comparisons
    sentence: str
    detail: str  # the comparisons one by one; empty where there is only one


def summarise(scores: Sequence[Score], resamples: int) -> list[Cell]:
    """Students that differ by their seed alone, as one; ordered by labels, fraction, model, arm."""
    groups = _by_point(scores)
    cells = []
    for point, group in groups.items():
        partner = [] if point.arm == "standard" else groups.get(point.under("standard"), [])
        paired = _paired(group, partner)
        cells.append(
            Cell(
                **point._asdict(),
                examples=round(float(np.mean([s.examples for s in group]))),
                rationales=round(float(np.mean([s.rationales for s in group]))),
                seeds=tuple(s.run.seed for s in group),
                accuracy=_accuracy(group, resamples),
                gain=None if paired is None else bootstrap([paired], resamples),
            )
        )
    return cells


def judge_rationales(scores: Sequence[Score], resamples: int) -> Verdict:
    """Whether step_by_step beat standard, over every pair with the same labels, fraction and seeds.

    The effect is read from one number, the mean of all paired differences: of many intervals looked at one
    by one, some exclude zero by luck.
    """
    groups = _by_point(scores)
    pairs = {}
    for point, group in groups.items():
        if point.arm == "step_by_step":
            paired = _paired(group, groups.get(point.under("standard"), []))
            if paired is not None:
                pairs[point] = paired
    if not pairs:
        return Verdict(
            "untested",
            None,
            "Whether rationales helped was not tested: no standard student stands beside a step_by_step student "
            "with the same labels, fraction and seed.",
            "",
        )
    difference = bootstrap(list(pairs.values()), resamples)
    effect = effect_of(difference)
    if len(pairs) == 1:
        point = next(iter(pairs))
        where = f"with {groups[point][0].examples:,} {point.labels} labels"
    else:
        where = f"averaged over {len(pairs)} amounts and kinds of labels"
    opening = {
        "helped": "Rationales helped here",
        "hurt": "Rationales hurt here",
        "undecided": "Rationales made no difference here that the interval can tell apart from zero",
    }[effect]
    sentence = f"{opening}: {where}, step_by_step is {_apart(difference, 'standard')}."
    if max(len(pair) for pair in pairs.values()) == 1:
        sentence += " With one seed a student, the interval does not show how much another seed would change."
    return Verdict(effect, difference, sentence, _one_by_one(list(pairs.values()), resamples))


def judge_labels(scores: Sequence[Score], resamples: int) -> list[str]:
    """One sentence an arm that learnt from both kinds of labels: the most teacher labels against the most gold."""
    groups = _by_point(scores)
    sentences = []
    for model, arm in dict.fromkeys((point.model, point.arm) for point in groups):
        gold, teacher = (
            max((p for p in groups if (p.labels, p.model, p.arm) == (source, model, arm)), default=None, key=_fraction)
            for source in ("gold", "teacher")
        )
        if gold is None or teacher is None:
            continue
        paired = _paired(groups[teacher], groups[gold])
        if paired is None:
            continue
        difference = bootstrap([paired], resamples)
        outcome = {"helped": ": teacher labels did better", "hurt": ": gold labels did better"}.get(
            effect_of(difference), ", which can't be told apart from zero"
        )
        apart = _apart(difference, f"what it reaches with {groups[gold][0].examples:,} gold labels")
        sentences.append(f"With {groups[teacher][0].examples:,} teacher labels {arm} is {apart}{outcome}.")
    return sentences


def judge_amount(scores: Sequence[Score], resamples: int) -> list[str]:
    """One sentence a kind of labels and model: the least labels with which step_by_step is as right as standard with
    most. As the paper puts it, but for the interval."""
    groups = _by_point(scores)
    sentences = []
    for labels, model in dict.fromkeys((point.labels, point.model) for point in groups):
        alike = [p for p in groups if (p.labels, p.model) == (labels, model)]
        most = max((p for p in alike if p.arm == "standard"), default=None, key=_fraction)
        ours = sorted((p for p in alike if p.arm == "step_by_step"), key=_fraction)
        if most is None or len(ours) < 2:
            continue
        bar = _accuracy(groups[most], resamples)
        whole = f"all {groups[most][0].examples:,} {labels} labels ({percent(bar.mean)} %)"
        meets = next((p for p in ours if _accuracy(groups[p], resamples).mean >= bar.mean), None)
        if meets is None:
            sentences.append(f"At no amount tried does step_by_step reach what standard does with {whole}.")
            continue
        sentence = (
            f"step_by_step reaches what standard does with {whole} from {groups[meets][0].examples:,} labels on, "
            f"{100 * meets.fraction:.4g} % of them"
        )
        paired = _paired(groups[meets], groups[most])
        if paired is not None:
            sentence += f": there it is {_apart(bootstrap([paired], resamples), 'that')}"
        sentences.append(sentence + ".")
    return sentences


def judge_control(scores: Sequence[Score], resamples: int) -> str:
    """Whether it is what rationales mean that helps, or only that there are more tokens to write; empty if untested."""
    groups = _by_point(scores)
    pairs = []
    for point, group in groups.items():
        if point.arm == "step_by_step":
            shuffled = [p for p in groups if p.under("standard") == point.under("standard") and p.arm == _CONTROL]
            pairs += [pair for p in shuffled if (pair := _paired(group, groups[p])) is not None]
    if not pairs:
        return ""
    difference = bootstrap(pairs, resamples)
    outcome = {
        "helped": "so what the rationales say matters",
        "hurt": "so what the rationales say does not help here",
        "undecided": "which can't be told apart from zero, so a gain may be owed to the second task alone",
    }[effect_of(difference)]
    return f"step_by_step is {_apart(difference, 'the control, whose rationales are shuffled')}, {outcome}."


def judge_size(sizes: dict[str, tuple[int, Interval, int]], teacher: Interval) -> str:
    """The smallest student that is righter than its teacher, and the least labels it takes.

    Args:
        sizes: student → its parameters, its accuracy, the labels it learnt from.
        teacher: its accuracy on the same rows.
    """
    better = [
        (parameters, examples, name)
        for name, (parameters, accuracy, examples) in sizes.items()
        if accuracy.mean > teacher.mean
    ]
    if not better:
        return f"No student is righter than the teacher ({percent(teacher.mean)} %)."
    parameters, examples, name = min(better)
    return (
        f"The smallest student that is righter than the teacher ({percent(teacher.mean)} %) is {name}, with "
        f"{parameters:,} parameters and {examples:,} labels: {percent(sizes[name][1].mean)} %."
    )


def compare_to_teacher(best: Score, teacher: Interval) -> str:
    """The chosen student's accuracy beside the teacher's, in words."""
    mean, low, high = best.accuracy
    return (
        f"The chosen student is right on {percent(mean)} % ({percent(low)} to {percent(high)}), "
        f"{_distance(mean - teacher.mean)} the teacher's {percent(teacher.mean)} % "
        f"({percent(teacher.low)} to {percent(teacher.high)})."
    )


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


def _by_point(scores: Sequence[Score]) -> dict[Point, list[Score]]:
    """Students by what they have in common, in the order of their seeds; gold first, small first, arms in order."""
    arms = get_args(Arm)

    def place(score: Score) -> tuple[object, ...]:
        point = Point.of(score.run)
        return point.labels, point.fraction, point.model or "", arms.index(point.arm), point.alpha or 0.0

    ordered = sorted(scores, key=lambda score: (place(score), score.run.seed))
    return {point: list(group) for point, group in itertools.groupby(ordered, lambda score: Point.of(score.run))}


def _fraction(point: Point) -> float:
    return point.fraction


def _accuracy(group: Sequence[Score], resamples: int) -> Interval:
    """Of one seed as it was measured at its evaluation, so that no number stands twice with different ends."""
    return group[0].accuracy if len(group) == 1 else bootstrap([_outcomes(group)], resamples)


def _outcomes(group: Sequence[Score]) -> Outcomes:
    return np.stack([score.right for score in group]).astype(np.int8)


def _paired(group: Sequence[Score], baseline: Sequence[Score]) -> Outcomes | None:
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


def _apart(difference: Interval, baseline: str) -> str:
    interval = f"95 % interval {signed(difference.low)} to {signed(difference.high)}"
    return f"{_distance(difference.mean)} {baseline} ({interval})"


def _distance(difference: float) -> str:
    """`1.2 points above`, `level with` …"""
    size = percent(abs(difference))
    return "level with" if size == "0.0" else f"{size} points {'above' if difference > 0 else 'below'}"


def _one_by_one(pairs: Sequence[Outcomes], resamples: int) -> str:
    if len(pairs) == 1:
        return ""
    effects = [effect_of(bootstrap([pair], resamples)) for pair in pairs]
    return (
        f"Taken one by one they helped in {effects.count('helped')}, hurt in {effects.count('hurt')} and can't be "
        f"told apart from zero in {effects.count('undecided')} of {len(pairs)}; looked at alone, each of these may "
        "be luck."
    )
