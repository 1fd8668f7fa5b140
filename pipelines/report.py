"""STAGE 6 `distill report`: the students of a recipe beside each other and their teacher → report.html.

Reads the manifests of all stages and the students' predictions, nothing else. Writes `report.html` (one
file that needs no network), `results.csv`, `accuracy.svg` and `accuracy.png`; the table is in the manifest
too. What the numbers say is computed in `comparison.py`.
"""

import csv
import io
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from pipelines.artifact import Artifact
from pipelines.comparison import (
    Cell,
    Interval,
    Score,
    Verdict,
    compare_to_teacher,
    effect_of,
    judge_labels,
    judge_rationales,
    percent,
    signed,
    summarise,
    wilson,
)
from pipelines.console import say, show_table
from pipelines.lineage import Lineage
from pipelines.schema import SPLITS, Reason

TEMPLATE = "report.html.j2"
MODEL = "model"
CSV_COLUMNS = [
    *"kind arm labels fraction seed examples rationales split rows accuracy low high".split(),
    *"validation_accuracy best_step parameters seconds train_seconds uri".split(),
]

_INK = "#767676"  # stands out as much from white as from black; in the page it becomes the text's colour
_COLOURS = {"standard": "#d97706", "step_by_step": "#2f81f7"}
_MARKS = {"gold": ("o", "-"), "teacher": ("s", "--")}
_TEACHER = "teacher"
_SIZES = {"wide": (7.4, 4.2), "narrow": (3.9, 4.2)}  # inches; the narrow one is for phones


@dataclass(frozen=True)
class Student:
    """One student: its outcomes, its artefacts and what their manifests say."""

    score: Score
    artifact: Artifact
    evaluation: Artifact
    trained: dict[str, Any]
    evaluated: dict[str, Any]

    @property
    def validation(self) -> float:
        return float(self.trained["best"]["accuracy"])


@dataclass(frozen=True)
class Findings:
    """What the page shows of the students."""

    students: list[Student]  # in the recipe's order
    best: Student  # on validation; the first of equals
    cells: list[Cell]
    verdict: Verdict
    teacher: Interval | None  # None: it was not asked for this split
    teacher_rows: int

    @property
    def rows(self) -> int:
        return len(self.best.score.right)


def build_report(line: Lineage, force: bool = False) -> Artifact:
    """Write the report over all students of the recipe, or find it done; print its table either way.

    Raises:
        UserError: a student is not trained or not evaluated yet, or an earlier stage is not there.
    """
    artifact = line.report
    for run in line.recipe.students():
        line.require(line.student(run), "train")
        line.require(line.evaluation(run), "evaluate")
    parents = [line.require(parent, "rationales") for parent in (line.examples, line.generations, line.rationales)]
    parents.append(line.require(line.dataset, "dataset"))
    if artifact.begin(force):
        start = time.time()
        found = _find(line)
        figures = {name: _draw(found, size) for name, size in _SIZES.items()}
        svgs = {name: _svg(figure, salt=name) for name, figure in figures.items()}
        _write(artifact, "report.html", _page(line, parents, found, svgs).encode())
        _write(artifact, "results.csv", _csv(line, found).encode())
        _write(artifact, "accuracy.svg", svgs["wide"].encode())
        _write(artifact, "accuracy.png", _png(figures["wide"]))
        artifact.finish(line.snapshot(), parents, start, **_facts(line, found))
    _show(artifact)
    return artifact


def _find(line: Lineage) -> Findings:
    students = _read_students(line)
    scores = [student.score for student in students]
    resamples = line.recipe.evaluate.resamples
    teacher = line.rationales.manifest()["teacher_accuracy"].get(line.recipe.evaluate.split)
    return Findings(
        students=students,
        best=max(students, key=lambda student: student.validation),
        cells=summarise(scores, resamples),
        verdict=judge_rationales(scores, resamples),
        teacher=wilson(teacher["accuracy"], teacher["rows"]) if teacher else None,
        teacher_rows=teacher["rows"] if teacher else 0,
    )


def _read_students(line: Lineage) -> list[Student]:
    students = []
    row_ids = None
    for run in line.recipe.students():
        artifact, evaluation = line.student(run), line.evaluation(run)
        trained, evaluated = artifact.manifest(), evaluation.manifest()
        predictions = evaluation.read_table("predictions", columns=["row_id", "correct"]).sort_by("row_id")
        row_ids = predictions["row_id"] if row_ids is None else row_ids
        if not predictions["row_id"].equals(row_ids):
            raise RuntimeError(f"{evaluation.uri}: not the rows of the other students, so nothing can be paired")
        metrics = evaluated["metrics"]
        score = Score(
            run=run,
            right=predictions["correct"].to_numpy().astype(bool),
            accuracy=Interval(metrics["accuracy"], metrics["low"], metrics["high"]),
            examples=trained["rows"],
            rationales=trained["rationales"],
        )
        students.append(Student(score, artifact, evaluation, trained, evaluated))
    return students


# The figure


def _draw(found: Findings, size: tuple[float, float]) -> Figure:
    """Accuracy against labelled examples, on a transparent ground."""
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": _INK, "text.color": _INK}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
    amounts = sorted({cell.examples for cell in found.cells})
    low, high = np.log10(amounts[0]), np.log10(amounts[-1])
    series: dict[tuple[str, str], list[Cell]] = {}
    for cell in found.cells:
        series.setdefault((cell.arm, cell.labels), []).append(cell)
    for place, ((arm, source), cells) in enumerate(series.items()):
        aside = 10 ** (
            0.012 * max(high - low, 0.3) * (place - (len(series) - 1) / 2)
        )  # or error bars lie on one another
        marker, dash = _MARKS[source]
        mean, bottom, top = 100 * np.array([cell.accuracy for cell in cells]).T
        axes.errorbar(
            [cell.examples * aside for cell in cells],
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
    if found.teacher:
        axes.axhspan(100 * found.teacher.low, 100 * found.teacher.high, color=_INK, alpha=0.15, linewidth=0)
        axes.axhline(100 * found.teacher.mean, color=_INK, linewidth=1.5, label=_TEACHER)
    axes.set_xscale("log")
    room = max(0.07 * (high - low), 0.12)
    axes.set_xlim(10 ** (low - room), 10 ** (high + room))
    ticks = _apart(amounts, 0.16 * (high - low))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("labelled examples learnt from")
    axes.set_ylabel(f"right on {found.best.evaluated['split']}, %")
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


def _apart(amounts: Sequence[int], gap: float) -> list[int]:
    """The amounts that can be written side by side, `gap` decades or more apart; the largest is always one."""
    kept: list[int] = []
    for amount in reversed(amounts):
        if not kept or np.log10(kept[-1] / amount) >= gap:
            kept.append(amount)
    return kept[::-1]


def _svg(figure: Figure, salt: str) -> str:
    """`salt` keeps the ids of two figures on one page apart, and the same figure's the same."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # addresses of standards; none is needed
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return buffer.getvalue()


def _inline(svg: str, label: str) -> Markup:
    """An SVG as part of the page: as wide as there is room, in the page's own font and text colour."""
    box = svg.partition('viewBox="')[2].partition('"')[0]
    drawing = svg.partition("<svg")[2].partition(">")[2].replace(_INK, "currentColor")
    drawing = re.sub(r"font-family: [^;\"]*", "font-family: inherit", drawing)
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box, label) + Markup(drawing)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True, dpi=160)
    return buffer.getvalue()


# The files


def _write(artifact: Artifact, name: str, content: bytes) -> None:
    artifact.fs.pipe_file(artifact.path(name), content)


def _csv(line: Lineage, found: Findings) -> str:
    """One line a student, in the recipe's order, and one for the teacher where its accuracy is known."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    split = line.recipe.evaluate.split
    for student in found.students:
        trained = student.trained
        writer.writerow(
            {
                "kind": "student",
                **student.score.run.model_dump(),
                "examples": trained["rows"],
                "rationales": trained["rationales"],
                "split": split,
                **{name: student.evaluated["metrics"][name] for name in ("rows", "accuracy", "low", "high")},
                "validation_accuracy": student.validation,
                "best_step": trained["best"]["step"],
                **{name: trained[name] for name in ("parameters", "seconds", "train_seconds")},
                "uri": student.artifact.uri,
            }
        )
    if found.teacher:
        mean, low, high = found.teacher
        scored = {"split": split, "rows": found.teacher_rows, "accuracy": mean, "low": low, "high": high}
        writer.writerow({"kind": "teacher", **scored, "uri": line.generations.uri})
    return buffer.getvalue()


def _page(line: Lineage, stages: Sequence[Artifact], found: Findings, svgs: dict[str, str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, signed=signed, effect=effect_of, duration=duration)
    environment.filters.update(unbroken=lambda sentence: sentence.replace(" %", "\u00a0%"))
    environment.filters.update(amount=lambda number: f"{number:,}", share=lambda fraction: f"{100 * fraction:.4g}")
    groups: dict[tuple[str, float, int], list[Cell]] = {}
    for cell in found.cells:
        groups.setdefault((cell.labels, cell.fraction, cell.examples), []).append(cell)
    manifests = {stage.stage: stage.manifest() for stage in stages}
    every = [*manifests.values(), *(m for s in found.students for m in (s.trained, s.evaluated))]
    versions: dict[str, set[str]] = {}
    for package, version in (pair for manifest in every for pair in manifest["versions"].items()):
        versions.setdefault(package, set()).add(version)
    label = f"Accuracy against labelled examples. {found.verdict.sentence}"
    return environment.get_template(TEMPLATE).render(
        recipe=line.recipe,
        task=line.task,
        found=found,
        groups=groups,
        compared=compare_to_teacher(found.best.score, found.teacher) if found.teacher else "",
        label_findings=judge_labels([s.score for s in found.students], line.recipe.evaluate.resamples),
        figures={name: _inline(svg, label) for name, svg in svgs.items()},
        manifests=manifests,
        splits=[split for split in SPLITS if split in manifests["rationales"]["funnel"]],
        reasons=[r for r in Reason if any(r in count for count in manifests["rationales"]["funnel"].values())],
        total_seconds=sum(manifest["seconds"] for manifest in every),
        versions={package: sorted(seen) for package, seen in versions.items()},
        seeds=sorted({student.score.run.seed for student in found.students}),
        root=line.store.root,
        recipe_yaml=yaml.safe_dump(line.snapshot(), sort_keys=False, allow_unicode=True),
        predict_command=_predict_command(found.best.artifact.file_uri(MODEL)),
    )


def duration(seconds: float) -> str:
    """`42 s`, `3 min 51 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def _predict_command(model: str) -> str:
    return f'distill predict {shlex.quote(model)} "an input"'


# What a person sees at the end


def _facts(line: Lineage, found: Findings) -> dict[str, Any]:
    """The main numbers, for the manifest."""
    best = found.best
    return {
        "split": line.recipe.evaluate.split,
        "rows": found.rows,
        "table": [
            asdict(cell) | {"accuracy": cell.accuracy._asdict(), "gain": cell.gain._asdict() if cell.gain else None}
            for cell in found.cells
        ],
        "teacher": found.teacher._asdict() | {"rows": found.teacher_rows} if found.teacher else None,
        "verdict": {"effect": found.verdict.effect, "sentence": found.verdict.sentence},
        "best": {
            "student": best.score.run.name,
            "validation_accuracy": best.validation,
            "accuracy": best.score.accuracy.mean,
            "model": best.artifact.file_uri(MODEL),
        },
        "evaluations": {student.score.run.name: student.evaluation.key for student in found.students},
    }


def _show(artifact: Artifact) -> None:
    facts = artifact.manifest()
    rows = []
    for cell in facts["table"]:
        gain = _with_interval(cell["gain"], signed) if cell["gain"] else ""
        labels = f"{cell['examples']:,} {cell['labels']}"
        rows.append([cell["arm"], labels, str(len(cell["seeds"])), _with_interval(cell["accuracy"], percent), gain])
    if facts["teacher"]:
        rows.append(["teacher", "", "", _with_interval(facts["teacher"], percent), ""])
    title = f"Right on {facts['split']}, {facts['rows']:,} rows, in % with 95 % intervals"
    show_table(title, ["student", "labels", "seeds", "accuracy", "over standard"], rows)
    if not facts["teacher"]:
        say(f"  the teacher was not asked for {facts['split']}, so its accuracy there is not known")
    say(f"  {facts['verdict']['sentence']}")
    say(f"  report: {artifact.file_uri('report.html')}")
    say(f"  use {facts['best']['student']}, the best on validation: {_predict_command(facts['best']['model'])}")


def _with_interval(value: dict[str, float], write: Callable[[float], str]) -> str:
    return f"{write(value['mean'])} ({write(value['low'])}…{write(value['high'])})"
