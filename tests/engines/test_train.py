"""Ray Train and DeepSpeed with one and two workers, from texts that are given."""

import json
from pathlib import Path

import pytest
import yaml

from pipelines.dataset import build_dataset
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.predictor import Predictor
from pipelines.rationales import build_rationales
from pipelines.recipe import load_recipe
from pipelines.train import train_students

pytestmark = pytest.mark.ray

LABELS = ("bad", "good")
DAYS = [{"text": f"Day {n} was {('grim', 'fine')[n % 2]}.", "label": LABELS[n % 2]} for n in range(32)]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """A dataset of 32 rows with rationales, and students of three steps on it."""
    folder: Path = tmp_path_factory.mktemp("train")
    rows = [{"day": row["text"], "label": row["label"]} for row in DAYS]
    said = [{**row, "text": f"It was a {row['label']} day. So the answer is {row['label']}."} for row in rows]
    for name, content in {"train": rows, "validation": [{**r, "day": r["day"] + " Yes."} for r in rows]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, said)))
    task = {"name": "days", "input": "{day}", "answer": {"kind": "choice", "labels": list(LABELS)}}
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    recipe = {
        "name": "days",
        "storage": str(folder / "runs"),
        "task": str(folder / "task.yaml"),
        "source": {"root": str(folder), "train": "train.jsonl", "validation": "validation.jsonl"},
        "teacher": {"engine": "outputs", "outputs": {"train": "texts.jsonl"}},
        "student": {"batch_size": 8, "steps": 3, "eval_every": 3, "dropout": 0.0, "precision": "fp32", "workers": 2},
        "runs": [{"arm": "step_by_step"}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    made = Lineage(load_recipe(str(folder / "recipe.yaml")))
    build_rationales(made)
    build_dataset(made)
    return made


def trained(line: Lineage, **student: object) -> Lineage:
    """The line with other settings of the student, trained."""
    changed = line.recipe.student.model_copy(update=student)
    other = Lineage(line.recipe.model_copy(update={"student": changed, "name": line.recipe.name}))
    train_students(other, other.recipe.students())
    return other


def test_zero_3_learns_what_zero_1_learns_and_saves_a_whole_model(line: Lineage) -> None:
    sharded = trained(line, zero_stage=3)
    plain = trained(line, zero_stage=1)
    runs = [made.student(made.recipe.students()[0]) for made in (sharded, plain)]
    losses = [run.manifest()["history"][-1]["loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    inputs = [row["text"] for row in DAYS]
    confidences = [[p.confidence for p in Predictor.open(run.path("model")).predict(inputs)] for run in runs]
    assert confidences[0] == pytest.approx(confidences[1], rel=1e-2)
    assert runs[0].manifest()["parameters"] == runs[1].manifest()["parameters"] > 1e6


def test_too_few_rows_for_a_batch_are_refused_in_words(line: Lineage) -> None:
    with pytest.raises(UserError, match=r"leaves 32 rows, fewer than student\.batch_size 64"):
        trained(line, batch_size=64)
