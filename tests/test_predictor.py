"""Label-only inference: valid answers, exact probabilities, the order of the inputs."""

import json
from pathlib import Path

import pytest
import torch

from pipelines.errors import UserError
from pipelines.predictor import SIDECAR, Predictor
from pipelines.recipe import resolve
from pipelines.student import load_student, save_student
from pipelines.tasks import Task, load_task

pytestmark = pytest.mark.slow  # it loads transformers

CHOICE = load_task("returns_desk")
ROW_CHOICE = load_task("cqa")
EXPRESSION = load_task("svamp")


def predictor(task: Task) -> Predictor:
    model, tokenizer = load_student(resolve("builtin:quickstart/student"))
    return Predictor(model, tokenizer, task, max_new_tokens=8)


@pytest.fixture(scope="module")
def closed() -> Predictor:
    return predictor(CHOICE)


def test_confidence_is_the_labels_share_of_the_probability(closed: Predictor) -> None:
    text = "The lamp stopped working."
    ids = closed.tokenizer(f"predict: {text}", return_tensors="pt")["input_ids"]
    scores = []
    for label in CHOICE.answer.labels:
        target = closed.tokenizer(label, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = closed.model.eval()(input_ids=ids, labels=target).loss
        scores.append(-loss.item() * target.shape[1])
    expected = torch.tensor(scores).softmax(0)
    made = closed.predict([text])[0]
    assert made.label == CHOICE.answer.labels[int(expected.argmax())]
    assert made.confidence == pytest.approx(float(expected.max()), rel=1e-4)


def test_predictions_come_in_the_order_of_the_inputs_whatever_the_batches(closed: Predictor) -> None:
    inputs = ["x " * n for n in (30, 1, 200, 7)] + ["Übergröße 🧾\x00", ""]
    whole = closed.predict(inputs)
    single = [closed.predict([text])[0] for text in inputs]
    assert [p.label for p in whole] == [p.label for p in single]
    assert [p.confidence for p in whole] == pytest.approx([p.confidence for p in single], rel=1e-3)
    assert [p.label for p in closed.predict(inputs, batch_size=2)] == [p.label for p in whole]


def test_row_choices_are_answered_with_one_of_the_rows_own() -> None:
    choices = [["bank", "library"], ["a cold river", "mall", "yes"]]
    made = predictor(ROW_CHOICE).predict(["Where?", "Which?"], choices)
    assert [p.label in own for p, own in zip(made, choices, strict=True)] == [True, True]


def test_what_is_no_expression_has_no_label_but_its_text() -> None:
    made = predictor(EXPRESSION).predict(["How many?", "How much?"])
    for prediction in made:
        assert prediction.label is None or EXPRESSION.canonical(prediction.text)
        assert 0 <= prediction.confidence <= 1


def test_nothing_in_nothing_out(closed: Predictor) -> None:
    assert closed.predict([]) == []


def test_an_input_beyond_the_limit_is_cut_and_still_answered() -> None:
    short = predictor(CHOICE)
    short.max_input_tokens = 16
    assert short.predict(["word " * 5000])[0].label in CHOICE.answer.labels


def test_a_saved_student_answers_as_before(closed: Predictor, tmp_path: Path) -> None:
    save_student(closed.model, closed.tokenizer, tmp_path)
    facts = {"task": CHOICE.model_dump(mode="json"), "max_input_tokens": 1024}
    (tmp_path / SIDECAR).write_text(json.dumps(facts))
    assert Predictor.open(tmp_path).predict(["My dog chewed it."]) == closed.predict(["My dog chewed it."])


def test_a_folder_that_is_no_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill\.json"):
        Predictor.open(tmp_path)
