"""STAGE 6 `distill report`: the students of a recipe beside each other and their teacher → report.html.

Reads the manifests of all stages, what a search tried, the students' predictions and some rejected texts, nothing
else. Writes `report.html` (one file that needs no network), `results.csv`, and each figure as SVG and PNG; the table is
in the manifest too. What the numbers are is computed in `comparison.py`, what they say in `verdicts.py`.
"""

import csv
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from pipelines.artifact import Artifact
from pipelines.comparison import percent, signed
from pipelines.console import say, show_table
from pipelines.figure import png, svg
from pipelines.findings import Findings, find
from pipelines.lineage import MODEL, Lineage
from pipelines.page import draw_all, predict_command, render
from pipelines.recipe import Run

CSV_COLUMNS = [
    *"kind arm labels fraction alpha model teacher seed examples rationales split rows accuracy low high".split(),
    *"macro_f1 ece invalid milliseconds validation_score best_step parameters seconds train_seconds uri".split(),
]
_MEASURED = ("rows", "accuracy", "low", "high", "macro_f1", "ece", "invalid", "milliseconds")


def build_report(line: Lineage, force: bool = False, chosen: Sequence[Run] | None = None) -> Artifact:
    """Write the report over the students that a search chose, or by default over those of the recipe's `runs`, or find
    it done; print its table either way.

    Raises:
        UserError: a student is not trained or not evaluated yet, or an earlier stage is not there.
    """
    artifact = line.report(chosen)
    runs = line.recipe.students() if chosen is None else chosen
    for run in runs:
        line.require(line.student(run), "train")
        line.require(line.evaluation(run), "evaluate")
    parents = [line.require(parent, "rationales") for parent in (line.examples, line.generations, line.rationales)]
    parents.append(line.require(line.dataset, "dataset"))
    if chosen is not None:
        parents.append(line.require(line.search, "search"))
    if artifact.begin(force):
        with artifact.lease():
            _draw(line, artifact, parents, runs, searched=chosen is not None)
    _show(artifact)
    return artifact


def _draw(line: Lineage, artifact: Artifact, parents: list[Artifact], runs: Sequence[Run], searched: bool) -> None:
    start = time.time()
    found = find(line, runs, searched)
    figures = draw_all(found, line.recipe.student.metric)
    drawn = {name: svg(figure, salt=name) for name, figure in figures.items()}
    _write(artifact, "report.html", render(line, parents, found, drawn).encode())
    _write(artifact, "results.csv", _csv(line, found).encode())
    for name in (name for name in figures if name.endswith("_wide")):
        file = name.removesuffix("_wide")
        _write(artifact, f"{file}.svg", drawn[name].encode())
        _write(artifact, f"{file}.png", png(figures[name]))
    artifact.finish(line.snapshot(), parents, start, **_facts(line, found))


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
                "validation_score": student.validation,
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
            "validation_score": best.validation,
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
    say(f"  use {facts['best']['student']}, the best on validation: {predict_command(facts['best']['model'])}")


def _with_interval(value: dict[str, float], write: Callable[[float], str]) -> str:
    return f"{write(value['mean'])} ({write(value['low'])}…{write(value['high'])})"
