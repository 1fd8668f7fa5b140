"""The whole chain on the quickstart's models: real vLLM, Ray Data, Ray Train and DeepSpeed."""

import json
from pathlib import Path

import pytest

from pipelines.chain import run_chain
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.predictor import Predictor
from pipelines.recipe import PACKAGE, load_recipe
from pipelines.train import train_students

pytestmark = pytest.mark.ray

ROWS = 48


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """A small quickstart whose train split holds one message that no context of the teacher can take."""
    folder = tmp_path_factory.mktemp("chain")
    rows = (PACKAGE / "quickstart/data/train.jsonl").read_text().splitlines()[: ROWS - 1]
    rows.append(json.dumps({"message": "I lost the receipt. " * 2000, "decision": "decline"}))
    (folder / "train.jsonl").write_text("\n".join(rows))
    overrides = [
        f"storage={folder / 'runs'}",
        f"source.train={folder / 'train.jsonl'}",
        f"source.limit={ROWS}",
        "student.steps=4",
        "student.eval_every=2",
        "student.batch_size=8",
        "student.workers=2",
        "runs=[{arm: step_by_step}, {arm: step_by_step, labels: teacher, fraction: 0.5}]",
    ]
    made = Lineage(load_recipe("quickstart", overrides))
    run_chain(made)
    return made


def test_every_row_asked_for_is_accepted_or_rejected(line: Lineage) -> None:
    funnel = line.rationales.manifest()["funnel"]
    accepted, rejected = line.rationales.read_table("accepted"), line.rationales.read_table("rejected")
    assert {split: sum(count.values()) for split, count in funnel.items()} == dict.fromkeys(funnel, ROWS)
    assert len(accepted) + len(rejected) == ROWS * len(funnel)
    assert len(set(accepted["row_id"].to_pylist()) | set(rejected["row_id"].to_pylist())) == ROWS * len(funnel)


def test_teacher_answers_in_the_prompts_form(line: Lineage) -> None:
    row = line.rationales.read_table("accepted").to_pylist()[0]
    assert row["label"] in line.task.answer.labels
    assert row["text"].strip().startswith(row["rationale"])
    assert row["output_tokens"] > 10
    assert row["input_tokens"] > row["output_tokens"]


def test_a_message_beyond_the_context_is_rejected_and_the_rest_goes_on(line: Lineage) -> None:
    rows = [r for r in line.rationales.read_table("rejected").to_pylist() if r["error"] is not None]
    assert [r["split"] for r in rows] == ["train"]
    assert rows[0]["reason"] in ("engine_error", "input_too_long")
    assert rows[0]["detail"]


def test_students_are_hugging_face_directories_that_predict_valid_labels(line: Lineage) -> None:
    student = line.student(line.recipe.students()[0])
    assert student.manifest()["history"][-1]["step"] == 4
    predictions = Predictor.open(student.path("model")).predict(
        ["The lamp stopped working.", "Übergrößenträger \x00 🧾"]
    )
    assert [p.label in line.task.answer.labels for p in predictions] == [True, True]


def test_every_test_row_is_predicted_once(line: Lineage) -> None:
    for run in line.recipe.students():
        table = line.evaluation(run).read_table("predictions")
        test = line.dataset.read_table("test")
        assert sorted(table["row_id"].to_pylist()) == sorted(test["row_id"].to_pylist())


def test_a_second_run_skips_everything(line: Lineage, capsys: pytest.CaptureFixture[str]) -> None:
    finished = line.report().manifest()["finished"]
    run_chain(line)
    assert line.report().manifest()["finished"] == finished
    assert "STAGE" not in capsys.readouterr().out


def test_stages_without_their_parents_say_which_command_makes_them(line: Lineage) -> None:
    other = Lineage(line.recipe.model_copy(update={"storage": line.recipe.storage + "-empty"}))
    with pytest.raises(UserError, match="distill dataset"):
        train_students(other, other.recipe.students())


def test_report_stands_by_itself(line: Lineage) -> None:
    html = Path(line.report().path("report.html")).read_text()
    assert "step_by_step" in html
    assert 'src="http' not in html
