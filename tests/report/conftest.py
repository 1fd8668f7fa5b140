"""A report with everything on it."""

from typing import Any

import pytest

from pipelines.artifact import Artifact
from pipelines.report import build_report
from tests.report.artefacts import finish, lineage, write, write_search

GRIDS = [
    {
        "arm": ["standard", "step_by_step", "shuffled_rationale"],
        "alpha": [0.25, 0.75],
        "fraction": [0.25, 1.0],
        "seed": [0, 1],
    },
    {"arm": ["standard", "step_by_step"], "labels": "teacher", "alpha": 0.5},
    {"arm": "step_by_step", "teacher": "some/other-teacher", "alpha": 0.5},
    {"arm": ["standard", "step_by_step"], "model": "some/smaller-student", "alpha": 0.5},
]


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Over what a search chose: three arms, two amounts of labels of both kinds, two sizes, two teachers, two seeds."""
    keys: dict[str, Any] = {"teacher": {"model": "some/teacher", "price": {"replica_hour": 2.0}}}
    keys |= {"student": {"model": "some/student", "price": {"worker_hour": 0.5, "replica_hour": 0.1}}}
    folder = tmp_path_factory.mktemp("searched")
    other = lineage(folder, [{}], name="other", teacher={"model": "some/other-teacher"})
    finish(other, other.rationales, teacher_accuracy={"test": {"accuracy": 0.9, "rows": 200}})
    keys["dataset"] = {"rationales": [other.rationales.uri]}
    line = lineage(folder, [{}], search={"space": GRIDS}, **keys)
    chosen = [run for run in line.recipe.search.points() if run.alpha in (None, 0.5, 0.75)]
    gains = {"standard": 0, "step_by_step": 15, "shuffled_rationale": 5}
    right = {run: round(110 + 30 * run.fraction) + gains[run.arm] + 4 * run.seed for run in chosen}
    write(line, right, {run: 0.5 + right[run] / 1000 for run in chosen})
    write_search(line, chosen)
    return build_report(line, chosen=chosen)
