"""From trained students to a bundle: what is chosen, what is written, what is refused."""

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipelines.artifact import Artifact
from pipelines.checksums import SUMS, verify_checksums
from pipelines.errors import UserError
from pipelines.export import build_export
from pipelines.lineage import BUNDLE, MODEL, Lineage
from pipelines.predictor import Predictor
from pipelines.recipe import PACKAGE, load_recipe, resolve
from pipelines.schema import DATASET
from pipelines.student import load_student

pytestmark = pytest.mark.slow  # it loads transformers

ROWS = 80
ACCURACIES = {"standard": 0.5, "step_by_step": 0.75}


def write_parents(line: Lineage) -> None:
    """The dataset and the students of a recipe, as their stages leave them; the students are untrained."""
    torch.manual_seed(0)
    for split in ("validation", "test"):
        lines = (PACKAGE / "quickstart/data" / f"{split}.jsonl").read_text().splitlines()[:ROWS]
        rows = [{"row_id": str(n), "rationales": []} | fields(json.loads(text)) for n, text in enumerate(lines)]
        line.dataset.write_table(f"{split}/00000", pa.Table.from_pylist(rows, schema=DATASET))
    line.dataset.finish(line.snapshot(), [], time.time())
    for run in line.recipe.students():
        student = line.student(run)
        model, tokenizer = load_student(resolve("builtin:quickstart/student"))
        with torch.no_grad():  # so that the two answer differently
            model.lm_head.weight.mul_(1.0 if run.arm == "standard" else 1.5)
        Predictor(model, tokenizer, line.task, 256, 16, run.arm).save(student.path(MODEL))
        best = {"step": 7, "score": ACCURACIES[run.arm], "accuracy": ACCURACIES[run.arm]}
        numbers = {"rows": 600, "rationales": 506, "parameters": model.num_parameters()}
        student.finish(line.snapshot(), [line.dataset], time.time(), run=run.model_dump(), best=best, **numbers)


def fields(row: dict[str, Any]) -> dict[str, Any]:
    return {"input": row["message"], "label": row["decision"], "choices": None, "teacher_label": None}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    storage = tmp_path_factory.mktemp("runs")
    given = [f"storage={storage}", "runs=[{arm: [standard, step_by_step]}]", "export.precision=fp32"]
    made = Lineage(load_recipe("quickstart", given))
    write_parents(made)
    return made


@pytest.fixture(scope="module")
def made(line: Lineage) -> Artifact:
    return build_export(line)


def changed(line: Lineage, **keys: Any) -> Lineage:
    return Lineage(line.recipe.model_copy(update={"export": line.recipe.export.model_copy(update=keys)}))


def test_the_student_that_is_best_on_validation_is_taken(made: Artifact) -> None:
    assert made.manifest()["run"]["arm"] == "step_by_step"


def test_a_bundle_answers_as_the_student_with_calibrated_confidence(line: Lineage, made: Artifact) -> None:
    student = Predictor.open(line.student(line.recipe.students()[1]).path(MODEL))
    bundle = Predictor.open(made.path(BUNDLE))
    assert bundle.bundle is not None
    assert (bundle.bundle.name, bundle.bundle.version) == ("quickstart", made.key)
    inputs = line.dataset.read_table("test")["input"].to_pylist()
    before, after = student.predict(inputs, scores=True), bundle.predict(inputs, scores=True)
    assert [p.label for p in before] == [p.label for p in after]
    for a, b in zip(before, after, strict=True):
        assert a.scores is not None
        assert b.scores is not None
        powers = [p ** (1 / bundle.bundle.temperature) for p in a.scores.values()]
        assert list(b.scores.values()) == pytest.approx([p / sum(powers) for p in powers], rel=1e-3)
        assert b.confidence == max(b.scores.values())
        assert sum(b.scores.values()) == pytest.approx(1.0)


def test_calibration_mends_what_the_student_is_too_sure_of(made: Artifact) -> None:
    manifest = made.manifest()
    assert manifest["measures"]["validation"]["calibration_error"] < manifest["calibration_error_before"]
    assert manifest["measures"]["test"]["rows"] == ROWS


def test_a_bundle_is_a_plain_directory_without_pickle_that_names_its_lineage(line: Lineage, made: Artifact) -> None:
    folder = Path(made.path(BUNDLE))
    verify_checksums(folder)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".safetensors", ""}
    card = (folder / "README.md").read_text(encoding="utf-8")
    for told in (line.dataset.key, line.generations.key, made.key, "builtin:quickstart/teacher", "calibration error"):
        assert told in card


def test_a_bundle_that_was_touched_is_refused_by_name(made: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    made.fs.get(made.path(BUNDLE) + "/", str(folder), recursive=True)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        Predictor.open(folder)
    (folder / SUMS).unlink()
    with pytest.raises(UserError, match=SUMS):
        Predictor.open(folder)


def test_done_once_it_is_found_done(line: Lineage, made: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    finished = made.manifest()["finished"]
    assert build_export(line).manifest()["finished"] == finished
    assert "skipped" in capsys.readouterr().out


def test_below_the_threshold_a_bundle_abstains(line: Lineage) -> None:
    made = build_export(changed(line, abstain_below=0.999))
    predictor = Predictor.open(made.path(BUNDLE))
    answers = predictor.predict(["The lamp stopped working.", "x"])
    assert [p.abstained for p in answers] == [p.confidence < 0.999 for p in answers]
    assert made.manifest()["measures"]["validation"]["answered"] < 1


def relabelled(line: Lineage, name: str, right: int) -> Lineage:
    """In another storage: the student is right on so many validation rows, those of which it is surest."""
    other = Lineage(line.recipe.model_copy(update={"storage": f"{line.recipe.storage}-{name}"}))
    write_parents(other)
    student = Predictor.open(other.student(other.recipe.students()[1]).path(MODEL))
    rows = other.dataset.read_table("validation").to_pylist()
    made = student.predict([row["input"] for row in rows])
    surest = sorted(range(len(rows)), key=lambda at: -made[at].confidence)
    for rank, at in enumerate(surest):
        wrong = next(label for label in line.task.answer.labels if label != made[at].label)
        rows[at]["label"] = made[at].label if rank < right else wrong
    other.dataset.write_table("validation/00000", pa.Table.from_pylist(rows, schema=DATASET))
    return other


def test_the_threshold_is_chosen_for_the_accuracy_of_what_is_answered(line: Lineage) -> None:
    half = relabelled(line, "half", ROWS // 2)
    measures = build_export(changed(half, answered_accuracy=0.8)).manifest()["measures"]["validation"]
    assert measures["accuracy"] == 0.5
    assert measures["answered_accuracy"] >= 0.8
    assert measures["answered"] == pytest.approx(0.5 / 0.8, abs=1 / ROWS)


def test_an_accuracy_that_no_threshold_reaches_is_refused(line: Lineage) -> None:
    wrong = relabelled(line, "wrong", 0)
    with pytest.raises(UserError, match=r"answered_accuracy 0\.9"):
        build_export(changed(wrong, answered_accuracy=0.9))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_lower_precision_is_recorded_and_the_weights_stay_as_they_are(line: Lineage, precision: str) -> None:
    made = build_export(changed(line, precision=precision, agreement=0.5))
    assert made.manifest()["bundle"]["precision"] == precision
    folder = Path(made.path(BUNDLE))
    assert json.loads((folder / "distill.json").read_text())["bundle"]["precision"] == precision
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"  # for processors that lack it
    texts = ["The lamp stopped working.", "I changed my mind. " * 20]
    predictor = Predictor.open(folder)
    together, alone = predictor.predict(texts), [predictor.predict([text])[0] for text in texts]
    assert [p.confidence for p in together] == pytest.approx([p.confidence for p in alone], rel=1e-3)


def test_a_precision_that_answers_otherwise_is_refused(line: Lineage, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(predictor: Predictor, precision: str, device: str) -> None:
        if precision == "int8":
            predictor.model.lm_head.weight.data.neg_()

    monkeypatch.setattr(Predictor, "_prepare", spoilt)
    with pytest.raises(UserError, match=r"precision int8: it answers \d"):
        build_export(changed(line, precision="int8", agreement=0.99))


def test_a_split_without_gold_labels_is_named(line: Lineage) -> None:
    other = Lineage(line.recipe.model_copy(update={"storage": line.recipe.storage + "-unlabelled"}))
    write_parents(other)
    table = other.dataset.read_table("validation")
    rows = [row | {"label": None} for row in table.to_pylist()]
    other.dataset.write_table("validation/00000", pa.Table.from_pylist(rows, schema=DATASET))
    with pytest.raises(UserError, match="validation split has no gold labels"):
        build_export(other)
