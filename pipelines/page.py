"""The report's page and figures, of what `findings.py` found."""

import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure

from pipelines.artifact import Artifact
from pipelines.browse import disputed, rejects
from pipelines.comparison import Cell, effect_of, percent, signed
from pipelines.console import duration
from pipelines.costs import student_thousand, students_bill, teacher_bill
from pipelines.examples import tell_counts
from pipelines.figure import SIZES, draw_alphas, draw_amounts, draw_confidence, draw_sizes, inline
from pipelines.findings import Findings, took_by_students
from pipelines.lineage import MODEL, Lineage
from pipelines.schema import SPLITS, Reason
from pipelines.verdicts import compare_to_teacher

TEMPLATE = "report.html.j2"
METRICS = {"accuracy": "right", "macro_f1": "macro-F1"}  # in words, before `on validation, %`
_FIGURES = {
    "accuracy": "Accuracy against labelled examples",
    "size": "Accuracy against student size",
    "alpha": "How good students are on validation against alpha",
    "confidence": "How far the chosen student's confidence can be trusted",
}


def draw_all(found: Findings, metric: str) -> dict[str, Figure]:
    """`<name>_wide` and `<name>_narrow` of every figure that there is something to show in."""
    made = {}
    split, metrics, model = found.best.evaluated["split"], found.best.evaluated["metrics"], found.best.score.run.model
    most: dict[tuple[Any, ...], float] = {}
    for cell in found.cells:  # in the order of their fractions
        most[cell.arm, cell.labels, cell.model, cell.teacher] = cell.fraction
    largest = [c for c in found.cells if c.fraction == most[c.arm, c.labels, c.model, c.teacher]]
    for name, size in SIZES.items():
        of_model = [cell for cell in found.cells if cell.model == model]
        made[f"accuracy_{name}"] = draw_amounts(of_model, found.teacher, split, size)
        if len(set(found.parameters.values())) > 1:
            made[f"size_{name}"] = draw_sizes(largest, found.parameters, found.teacher, split, size)
        if found.tried:
            made[f"alpha_{name}"] = draw_alphas(found.tried, METRICS[metric], size)
        made[f"confidence_{name}"] = draw_confidence(metrics, size)
    return made


def render(line: Lineage, stages: Sequence[Artifact], found: Findings, svgs: dict[str, str]) -> str:
    """The page as HTML."""
    groups: dict[tuple[str, float, int, str | None], list[Cell]] = {}
    for cell in found.cells:
        groups.setdefault((cell.labels, cell.fraction, cell.examples, cell.model), []).append(cell)
    manifests = {stage.stage: stage.manifest() for stage in stages}
    students = [manifest for s in found.students for manifest in (s.trained, s.evaluated)]
    every = [*manifests.values(), *students]
    by_clock = [*manifests.values(), *([] if found.trials else students)]  # a search has trained and scored its own
    versions: dict[str, set[str]] = {}
    for package, version in (pair for manifest in every for pair in manifest["versions"].items()):
        versions.setdefault(package, set()).add(version)
    recipe, metrics = line.recipe, found.best.evaluated["metrics"]
    return _template().render(
        recipe=recipe,
        metric=METRICS[recipe.student.metric],
        task=line.task,
        found=found,
        groups=groups,
        compared=compare_to_teacher(found.best.score, found.teacher) if found.teacher else "",
        figures={name: inline(drawn, _FIGURES[name.partition("_")[0]]) for name, drawn in svgs.items()},
        rejected=rejects(line.rationales),
        disputed=disputed(line, [student.score.run for student in found.students]),
        reads_of_test=line.reads_of_test(),
        rows_told=tell_counts(manifests["examples"]["counts"]),
        teacher_took=teacher_bill(recipe.teacher, [artifact.manifest() for artifact in line.paid]),
        students_took=students_bill(recipe.student.price, took_by_students(line, found)),
        thousand=student_thousand(recipe.student.price, metrics),
        manifests=manifests,
        splits=[split for split in SPLITS if split in manifests["rationales"]["funnel"]],
        reasons=[r for r in Reason if any(r in count for count in manifests["rationales"]["funnel"].values())],
        total_seconds=sum(manifest["seconds"] for manifest in by_clock),
        versions={package: sorted(seen) for package, seen in versions.items()},
        seeds=sorted({student.score.run.seed for student in found.students}),
        root=line.store.root,
        recipe_yaml=yaml.safe_dump(line.snapshot(), sort_keys=False, allow_unicode=True),
        predict_command=predict_command(found.best.artifact.file_uri(MODEL)),
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


def predict_command(model: str) -> str:
    return f'distill predict {shlex.quote(model)} "an input"'
