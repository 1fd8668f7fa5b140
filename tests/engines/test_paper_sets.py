"""The paper's sets whose train questions are at hand, from their real files to a report, with tiny students. They are
not part of the project: the environment variable STEPDISTILL_REFERENCE names the folder that holds them."""

import os
from pathlib import Path

import pytest

from pipelines.lineage import Lineage
from pipelines.recipe import load_recipe
from pipelines.report import build_report
from pipelines.search import chosen_runs, search_students

pytestmark = pytest.mark.ray

REFERENCE = Path(os.environ.get("STEPDISTILL_REFERENCE", Path(__file__).parents[3] / "shared/data/reference"))
TINY = (
    "student.model=builtin:quickstart/student",
    "student.precision=fp32",
    "student.batch_size=8",
    "student.steps=2",
    "student.max_input_tokens=128",
    "student.max_target_tokens=128",
    "search.space={alpha: 0.5, fraction: 0.125}",
)


@pytest.mark.parametrize(("name", "rows", "right"), [("svamp", 200, 156), ("cqa", 1221, 958)])
def test_a_set_of_the_paper_is_searched_and_reported(tmp_path: Path, name: str, rows: int, right: int) -> None:
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference data at {REFERENCE}; STEPDISTILL_REFERENCE can name another folder")
    line = Lineage(load_recipe(name, [f"storage={tmp_path}", f"source.root={REFERENCE / name}", *TINY]))
    search_students(line)
    made = build_report(line, chosen=chosen_runs(line)).manifest()
    assert [cell["arm"] for cell in made["table"]] == ["standard", "step_by_step"]
    assert made["rows"] == rows
    assert made["teacher"]["mean"] == pytest.approx(right / rows), "the teacher's, few-shot"
