"""The report's figures, each for a page of either colour, and for a wide or a narrow one."""

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from pipelines.comparison import Cell, Interval, Point, Tried
from pipelines.recipe import short_name

Size = tuple[float, float]  # inches

_INK = "#767676"  # stands out as much from white as from black; in the page it becomes the text's colour
_COLOURS = {
    "standard": "#d97706",
    "step_by_step": "#2f81f7",
    "rationale_first": "#a371f7",
    "label_first": "#2da44e",
    "shuffled_rationale": "#8b949e",
}
_MARKS = {"gold": ("o", "-"), "teacher": ("s", "--")}
_TEACHER = "teacher"
SIZES: dict[str, Size] = {"wide": (7.4, 4.2), "narrow": (3.9, 4.2)}  # the narrow one is for phones


def draw_amounts(cells: Sequence[Cell], teacher: Interval | None, split: str, size: Size) -> Figure:
    """Accuracy against labelled examples."""
    return _draw(cells, lambda cell: cell.examples, "labelled examples learnt from", teacher, split, size)


def draw_sizes(
    cells: Sequence[Cell], parameters: dict[str | None, int], teacher: Interval | None, split: str, size: Size
) -> Figure:
    """Accuracy against student size.

    Args:
        parameters: of each model that the cells name.
    """
    return _draw(cells, lambda cell: parameters[cell.model], "parameters of the student", teacher, split, size)


def draw_alphas(tried: Sequence[Tried], metric: str, size: Size) -> Figure:
    """A metric on validation against alpha: a dash a seed, and their mean."""
    figure, (axes,) = _paper(size)
    lines: dict[Point, list[Tried]] = {}
    for one in tried:
        lines.setdefault(one.point._replace(alpha=None), []).append(one)
    for arm in dict.fromkeys(point.arm for point in lines):
        own = [point for point in lines if point.arm == arm]
        for place, point in enumerate(own, 1):
            colour = to_rgba(_COLOURS[arm], 0.25 + 0.75 * place / len(own))  # the more labels, the darker
            line = sorted(lines[point], key=lambda one: one.alpha)
            alphas = [one.alpha for one in line]
            for alpha, one in zip(alphas, line, strict=True):
                axes.plot([alpha] * len(one.scores), _percents(one.scores), "_", color=colour)
            means = _percents([one.mean for one in line])
            name = f"{arm}, {100 * point.fraction:.4g} % of {point.labels} labels"
            name += _of(point.model) + _of(point.teacher)
            axes.plot(alphas, means, color=colour, marker="o", linewidth=1.8, label=name)
    alphas = sorted({one.alpha for one in tried})
    axes.set_xticks(alphas, [f"{alpha:.4g}" for alpha in alphas])
    axes.set(xlabel="alpha, the weight of the label loss", ylabel=f"{metric} on validation, %")
    _legend(figure, axes, size)
    return figure


def draw_confidence(metrics: dict[str, Any], size: Size) -> Figure:
    """Two panels of one student: how right it is when how sure, and how right it would be if it abstained when unsure.

    Args:
        metrics: `bins` and `coverage` as `metrics.calibrate` and `metrics.cover` make them.
    """
    wide = size == SIZES["wide"]
    figure, (sure, covered) = _paper((size[0], 3.4) if wide else (size[0], 6.4), *((1, 2) if wide else (2, 1)))
    sure.plot([0, 100], [0, 100], color=_INK, linewidth=1, linestyle=":")
    sizes = [12 + 160 * b["rows"] / metrics["rows"] for b in metrics["bins"]]
    sure.scatter(
        _percents([b["confidence"] for b in metrics["bins"]]),
        _percents([b["accuracy"] for b in metrics["bins"]]),
        s=sizes,
        color=_COLOURS["step_by_step"],
        clip_on=False,
    )
    sure.set(xlabel="how sure it is, %", ylabel="how often right, %", xlim=(0, 102), ylim=(0, 102))
    share = _percents([point["coverage"] for point in metrics["coverage"]])
    right = _percents([point["accuracy"] for point in metrics["coverage"]])
    covered.plot(share, right, color=_COLOURS["step_by_step"], linewidth=1.8, clip_on=False)
    covered.set(xlabel="rows answered, the surest, %", ylabel="right among them, %", xlim=(0, 102), ylim=(0, 102))
    return figure


def _draw(
    cells: Sequence[Cell],
    of: Callable[[Cell], int],
    what: str,
    teacher: Interval | None,
    split: str,
    size: Size,
) -> Figure:
    """Accuracy with its intervals against an amount, on a scale of ratios; a line an arm and kind of labels."""
    figure, (axes,) = _paper(size)
    amounts = sorted({of(cell) for cell in cells})
    low, high = np.log10(amounts[0]), np.log10(amounts[-1])
    series = _series(cells, of)
    alike: Counter[tuple[str, str]] = Counter()
    for place, (label, points) in enumerate(series.items()):
        first = points[0]
        paler = 0.55 ** alike[first.arm, first.labels]  # than those that share its colour
        alike[first.arm, first.labels] += 1
        # or error bars lie on one another
        aside = 10 ** (0.012 * max(high - low, 0.3) * (place - (len(series) - 1) / 2))
        marker, dash = _MARKS[first.labels]
        mean, bottom, top = 100 * np.array([cell.accuracy for cell in points]).T
        axes.errorbar(
            [of(cell) * aside for cell in points],
            mean,
            yerr=np.maximum([mean - bottom, top - mean], 0),  # a percentile interval need not hold its mean
            color=_COLOURS[first.arm],
            alpha=paler,
            marker=marker,
            markersize=6,
            linestyle=dash,
            linewidth=1.8,
            elinewidth=1.2,
            capsize=3,
            label=label,
        )
    if teacher:
        axes.axhspan(100 * teacher.low, 100 * teacher.high, color=_INK, alpha=0.15, linewidth=0)
        axes.axhline(100 * teacher.mean, color=_INK, linewidth=1.5, label=_TEACHER)
    axes.set_xscale("log")
    room = max(0.07 * (high - low), 0.12)
    axes.set_xlim(10 ** (low - room), 10 ** (high + room))
    ticks = _apart(amounts, (0.16 if size == SIZES["wide"] else 0.25) * (high - low))
    axes.set_xticks(ticks, [_short(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=what, ylabel=f"right on {split}, %")
    _legend(figure, axes, size)
    return figure


def _series(cells: Sequence[Cell], of: Callable[[Cell], int]) -> dict[str, list[Cell]]:
    """The lines of a figure by their names; alphas tell lines apart only where one amount has several."""
    groups: dict[tuple[str, str, str | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.arm, cell.labels, cell.teacher), []).append(cell)
    series: dict[str, list[Cell]] = {}
    for (arm, labels, teacher), points in groups.items():
        several = len({of(point) for point in points}) < len(points)
        for point in points:
            alpha = f", alpha {point.alpha:.4g}" if several and point.alpha is not None else ""
            series.setdefault(f"{arm}, {labels} labels{_of(teacher)}{alpha}", []).append(point)
    return {name: sorted(points, key=of) for name, points in series.items()}


def _paper(size: Size, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure on a transparent ground, and its panels."""
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": _INK, "text.color": _INK}):
        figure = Figure(figsize=size, layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.grid(axis="y", color=_INK, alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
    return figure, panels


def _legend(figure: Figure, axes: Axes, size: Size) -> None:
    names = zip(*axes.get_legend_handles_labels(), strict=True)
    ordered = sorted(names, key=lambda pair: pair[1] == _TEACHER)  # students first
    figure.legend(
        *zip(*ordered, strict=True),
        loc="outside upper left",
        ncols=2 if size == SIZES["wide"] and len(ordered) > 1 else 1,
        frameon=False,
        labelcolor=_INK,
        fontsize=9.5,
    )


def _of(model: str | None) -> str:
    """What a line's name says of a model or teacher of its own."""
    return "" if model is None else f", {short_name(model)}"


def _percents(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _apart(amounts: Sequence[int], gap: float) -> list[int]:
    """The amounts that can be written side by side, `gap` decades or more apart; the largest is always one."""
    kept: list[int] = []
    for amount in reversed(amounts):
        if not kept or np.log10(kept[-1] / amount) >= gap:
            kept.append(amount)
    return kept[::-1]


def _short(amount: int) -> str:
    """`1,800`, `2.4 M`, `11 B`."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if amount >= size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount:,}"


def svg(figure: Figure, salt: str) -> str:
    """`salt` keeps the ids of two figures on one page apart, and the same figure's the same."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # addresses of standards; none is needed
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return buffer.getvalue()


def inline(drawn: str, label: str) -> Markup:
    """An SVG as part of the page: as wide as there is room, in the page's own font and text colour."""
    box = drawn.partition('viewBox="')[2].partition('"')[0]
    drawing = drawn.partition("<svg")[2].partition(">")[2].replace(_INK, "currentColor")
    drawing = re.sub(r"font-family: [^;\"]*", "font-family: inherit", drawing)
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box, label) + Markup(drawing)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True, dpi=160)
    return buffer.getvalue()
