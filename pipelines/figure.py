"""The report's figure: accuracy against labelled examples, for a page of either colour."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from pipelines.comparison import Cell, Interval

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
SIZES = {"wide": (7.4, 4.2), "narrow": (3.9, 4.2)}  # inches; the narrow one is for phones


def draw(cells: Sequence[Cell], teacher: Interval | None, split: str, size: tuple[float, float]) -> Figure:
    """Accuracy against labelled examples, on a transparent ground."""
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": _INK, "text.color": _INK}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
    amounts = sorted({cell.examples for cell in cells})
    low, high = np.log10(amounts[0]), np.log10(amounts[-1])
    series: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        series.setdefault((cell.arm, cell.labels), []).append(cell)
    for place, ((arm, source), points) in enumerate(series.items()):
        aside = 10 ** (
            0.012 * max(high - low, 0.3) * (place - (len(series) - 1) / 2)
        )  # or error bars lie on one another
        marker, dash = _MARKS[source]
        mean, bottom, top = 100 * np.array([cell.accuracy for cell in points]).T
        axes.errorbar(
            [cell.examples * aside for cell in points],
            mean,
            yerr=np.maximum([mean - bottom, top - mean], 0),  # a percentile interval need not hold its mean
            color=_COLOURS[arm],
            marker=marker,
            markersize=6,
            linestyle=dash,
            linewidth=1.8,
            elinewidth=1.2,
            capsize=3,
            label=f"{arm}, {source} labels",
        )
    if teacher:
        axes.axhspan(100 * teacher.low, 100 * teacher.high, color=_INK, alpha=0.15, linewidth=0)
        axes.axhline(100 * teacher.mean, color=_INK, linewidth=1.5, label=_TEACHER)
    axes.set_xscale("log")
    room = max(0.07 * (high - low), 0.12)
    axes.set_xlim(10 ** (low - room), 10 ** (high + room))
    ticks = _apart(amounts, 0.16 * (high - low))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("labelled examples learnt from")
    axes.set_ylabel(f"right on {split}, %")
    axes.grid(axis="y", color=_INK, alpha=0.25, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    handles, labels = axes.get_legend_handles_labels()
    names = sorted(zip(handles, labels, strict=True), key=lambda pair: pair[1] == _TEACHER)  # students first
    figure.legend(
        *zip(*names, strict=True),
        loc="outside upper left",
        ncols=2 if size[0] > 6 and len(names) > 1 else 1,
        frameon=False,
        labelcolor=_INK,
        fontsize=9.5,
    )
    return figure


def draw_confidence(metrics: dict[str, Any]) -> Figure:
    """Two panels of one student: how right it is when how sure, and how right it would be if it abstained when unsure.

    Args:
        metrics: `bins` and `coverage` as `metrics.calibrate` and `metrics.cover` make them.
    """
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": _INK, "text.color": _INK}):
        figure = Figure(figsize=(7.4, 3.4), layout="constrained")
        sure, covered = figure.subplots(1, 2)
    sure.plot([0, 100], [0, 100], color=_INK, linewidth=1, linestyle=":")
    confidence = [100 * b["confidence"] for b in metrics["bins"]]
    sizes = [12 + 160 * b["rows"] / metrics["rows"] for b in metrics["bins"]]
    sure.scatter(confidence, [100 * b["accuracy"] for b in metrics["bins"]], s=sizes, color=_COLOURS["step_by_step"])
    sure.set(xlabel="how sure it is, %", ylabel="how often right, %", xlim=(0, 102), ylim=(0, 102))
    share = [100 * point["coverage"] for point in metrics["coverage"]]
    right = [100 * point["accuracy"] for point in metrics["coverage"]]
    covered.plot(share, right, color=_COLOURS["step_by_step"], linewidth=1.8)
    covered.set(xlabel="rows answered, the surest, %", ylabel="right among them, %", xlim=(0, 102), ylim=(0, 102))
    for axes in (sure, covered):
        axes.grid(color=_INK, alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
    return figure


def _apart(amounts: Sequence[int], gap: float) -> list[int]:
    """The amounts that can be written side by side, `gap` decades or more apart; the largest is always one."""
    kept: list[int] = []
    for amount in reversed(amounts):
        if not kept or np.log10(kept[-1] / amount) >= gap:
            kept.append(amount)
    return kept[::-1]


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
