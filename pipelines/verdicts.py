"""What the numbers of the report say, in words.

Pure functions of the same outcomes as `comparison.py`. Sentences speak of percentage points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.comparison import (
    Effect,
    Interval,
    Outcomes,
    Point,
    Score,
    accuracy_of,
    bootstrap,
    by_point,
    effect_of,
    paired_outcomes,
    percent,
    signed,
)
from pipelines.recipe import Arm

_CONTROL: Arm = "shuffled_rationale"


@dataclass(frozen=True)
class Verdict:
    """Whether rationales helped."""

    effect: Effect
    difference: Interval | None  # step_by_step minus standard, averaged over all comparisons
    sentence: str
    detail: str  # the comparisons one by one; empty where there is only one


def judge_rationales(scores: Sequence[Score], resamples: int) -> Verdict:
    """Whether step_by_step beat standard, over every pair with the same labels, fraction and seeds.

    The effect is read from one number, the mean of all paired differences: of many intervals looked at one
    by one, some exclude zero by luck.
    """
    groups = by_point(scores)
    pairs = {}
    for point, group in groups.items():
        if point.arm == "step_by_step":
            paired = paired_outcomes(group, groups.get(point.standard(), []))
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
        where = f"averaged over {len(pairs)} comparisons"
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
    groups = by_point(scores)
    sentences = []
    for model, arm in dict.fromkeys((point.model, point.arm) for point in groups):
        gold, teacher = (
            max((p for p in groups if (p.labels, p.model, p.arm) == (source, model, arm)), default=None, key=_fraction)
            for source in ("gold", "teacher")
        )
        if gold is None or teacher is None:
            continue
        paired = paired_outcomes(groups[teacher], groups[gold])
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
    groups = by_point(scores)
    sentences = []
    for labels, model in dict.fromkeys((point.labels, point.model) for point in groups):
        alike = [p for p in groups if (p.labels, p.model) == (labels, model)]
        most = max((p for p in alike if p.arm == "standard"), default=None, key=_fraction)
        ours = sorted((p for p in alike if p.arm == "step_by_step"), key=_fraction)
        if most is None or len(ours) < 2:
            continue
        bar = accuracy_of(groups[most], resamples)
        whole = f"all {groups[most][0].examples:,} {labels} labels ({percent(bar.mean)} %)"
        meets = next((p for p in ours if accuracy_of(groups[p], resamples).mean >= bar.mean), None)
        if meets is None:
            sentences.append(f"At no amount tried does step_by_step reach what standard does with {whole}.")
            continue
        sentence = (
            f"step_by_step reaches what standard does with {whole} from {groups[meets][0].examples:,} labels on, "
            f"{100 * meets.fraction:.4g} % of them"
        )
        paired = paired_outcomes(groups[meets], groups[most])
        if paired is not None:
            sentence += f": there it is {_apart(bootstrap([paired], resamples), 'that')}"
        sentences.append(sentence + ".")
    return sentences


def judge_control(scores: Sequence[Score], resamples: int) -> str:
    """Whether it is what rationales mean that helps, or only that there are more tokens to write; empty if untested."""
    groups = by_point(scores)
    pairs = []
    for point, group in groups.items():
        if point.arm == "step_by_step":
            own = point._replace(arm=_CONTROL, alpha=None)
            shuffled = [p for p in groups if p.arm == _CONTROL and p._replace(alpha=None) == own]
            pairs += [pair for p in shuffled if (pair := paired_outcomes(group, groups[p])) is not None]
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


def _fraction(point: Point) -> float:
    return point.fraction
