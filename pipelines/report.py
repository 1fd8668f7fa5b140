"""STAGE 6 `distill report`: the students of a recipe beside each other and their teacher → report.html.

Reads the manifests of all stages and the students' predictions, nothing else. Writes `report.html` (one
file that needs no network), `results.csv`, `accuracy.svg` and `accuracy.png`; the table is in the manifest
too. What the numbers say is computed in `comparison.py`.
"""

import csv
import io
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipelines.artifact import Artifact
from pipelines.browse import disputed, rejects
from pipelines.comparison import Cell, Interval, Score, effect_of, percent, signed, summarise, wilson
from pipelines.console import say, show_table
from pipelines.figure import SIZES, draw, draw_confidence, inline, png, svg
from pipelines.lineage import MODEL, Lineage
from pipelines.recipe import Run
from pipelines.schema import SPLITS, Reason
from pipelines.verdicts import (
    Verdict,
    compare_to_teacher,
    judge_amount,
    judge_control,
    judge_labels,
    judge_rationales,
    judge_size,
)

TEMPLATE = "report.html.j2"
CSV_COLUMNS = [
    *"kind arm labels fraction alpha model seed examples rationales split rows accuracy low high".split(),
    *"macro_f1 ece invalid milliseconds validation_accuracy best_step parameters seconds train_seconds uri".split(),
]
_MEASURED = ("rows", "accuracy", "low", "high", "macro_f1", "ece", "invalid", "milliseconds")


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
    sentences: list[str]  # what else is to be said

    @property
    def rows(self) -> int:
        return len(self.best.score.right)


def build_report(line: Lineage, force: bool = False, runs: Sequence[Run] | None = None) -> Artifact:
    """Write the report over students, by default those of the recipe's `runs`, or find it done; print its table either
    way.

    Raises:
        UserError: a student is not trained or not evaluated yet, or an earlier stage is not there.
    """
    runs = line.recipe.students() if runs is None else runs
    artifact = line.report(runs)
    for run in runs:
        line.require(line.student(run), "train")
        line.require(line.evaluation(run), "evaluate")
    parents = [line.require(parent, "rationales") for parent in (line.examples, line.generations, line.rationales)]
    parents.append(line.require(line.dataset, "dataset"))
    if artifact.begin(force):
        with artifact.lease():
            _draw(line, artifact, parents, runs)
    _show(artifact)
    return artifact


def _draw(line: Lineage, artifact: Artifact, parents: list[Artifact], runs: Sequence[Run]) -> None:
    start = time.time()
    found = _find(line, runs)
    split = found.best.evaluated["split"]
    figures = {f"accuracy_{name}": draw(found.cells, found.teacher, split, size) for name, size in SIZES.items()}
    figures["confidence"] = draw_confidence(found.best.evaluated["metrics"])
    svgs = {name: svg(figure, salt=name) for name, figure in figures.items()}
    _write(artifact, "report.html", _page(line, parents, found, svgs).encode())
    _write(artifact, "results.csv", _csv(line, found).encode())
    for file, figure in {"accuracy": "accuracy_wide", "confidence": "confidence"}.items():
        _write(artifact, f"{file}.svg", svgs[figure].encode())
        _write(artifact, f"{file}.png", png(figures[figure]))
    artifact.finish(line.snapshot(), parents, start, **_facts(line, found))


def _find(line: Lineage, runs: Sequence[Run]) -> Findings:
    students = _read_students(line, runs)
    scores = [student.score for student in students]
    resamples = line.recipe.evaluate.resamples
    told = line.rationales.manifest()["teacher_accuracy"].get(line.recipe.evaluate.split)
    teacher = wilson(told["accuracy"], told["rows"]) if told else None
    sizes = {s.score.run.name: (s.trained["parameters"], s.score.accuracy, s.score.examples) for s in students}
    sentences = [
        *judge_amount(scores, resamples),
        judge_control(scores, resamples),
        *judge_labels(scores, resamples),
        judge_size(sizes, teacher) if teacher else "",
    ]
    return Findings(
        students=students,
        best=max(students, key=lambda student: student.validation),
        cells=summarise(scores, resamples),
        verdict=judge_rationales(scores, resamples),
        teacher=teacher,
        teacher_rows=told["rows"] if told else 0,
        sentences=[sentence for sentence in sentences if sentence],
    )


def _read_students(line: Lineage, runs: Sequence[Run]) -> list[Student]:
    students = []
    row_ids = None
    for run in runs:
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
                **{name: student.evaluated["metrics"].get(name) for name in _MEASURED},
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


def _trials(line: Lineage) -> list[dict[str, Any]]:
    """What a finished search tried, by alpha: of each point and alpha the mean validation accuracy over seeds."""
    if not line.search.done():
        return []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for trial in line.search.read_table("trials").to_pylist():
        if trial["alpha"] is not None and trial["accuracy"] is not None:
            point = (trial["arm"], trial["labels"], trial["fraction"], trial["model"], trial["alpha"])
            groups.setdefault(point, []).append(trial)
    return [
        {
            "arm": arm,
            "labels": labels,
            "fraction": fraction,
            "alpha": alpha,
            "accuracy": sum(trial["accuracy"] for trial in group) / len(group),
            "students": len(group),
            "stopped": sum(trial["state"] == "stopped" for trial in group),
            "chosen": group[0]["chosen"],
        }
        for (arm, labels, fraction, _, alpha), group in groups.items()
    ]


def _page(line: Lineage, stages: Sequence[Artifact], found: Findings, svgs: dict[str, str]) -> str:
    groups: dict[tuple[str, float, int], list[Cell]] = {}
    for cell in found.cells:
        groups.setdefault((cell.labels, cell.fraction, cell.examples), []).append(cell)
    manifests = {stage.stage: stage.manifest() for stage in stages}
    every = [*manifests.values(), *(m for s in found.students for m in (s.trained, s.evaluated))]
    versions: dict[str, set[str]] = {}
    for package, version in (pair for manifest in every for pair in manifest["versions"].items()):
        versions.setdefault(package, set()).add(version)
    labels = dict.fromkeys(svgs, f"Accuracy against labelled examples. {found.verdict.sentence}")
    labels["confidence"] = "How far the chosen student's confidence can be trusted"
    return _template().render(
        recipe=line.recipe,
        task=line.task,
        found=found,
        groups=groups,
        compared=compare_to_teacher(found.best.score, found.teacher) if found.teacher else "",
        figures={name: inline(drawn, labels[name]) for name, drawn in svgs.items()},
        rejected=rejects(line.rationales),
        disputed=disputed(line, [student.score.run for student in found.students]),
        reads_of_test=line.reads_of_test(),
        trials=_trials(line),
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


@cache
def _template() -> jinja2.Template:
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
    return environment.get_template(TEMPLATE)


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
