"""Label-only inference: valid answers, exact probabilities, the order of the inputs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import decoding
from pipelines.errors import UserError
from pipelines.predictor import Predictor
from pipelines.recipe import Arm, resolve
from pipelines.student import load_student
from pipelines.tasks import Task, load_task
from pipelines.tasks.expression import may_begin

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


def constrained(student: Predictor, text: str, labels: Sequence[str], prefix: str = "predict: ") -> torch.Tensor:
    """The probability of each label, by the model's own forward: token by token, among those that some label has
    there."""
    model, tokenizer = student.model.eval(), student.tokenizer
    opening = [model.config.decoder_start_token_id]
    if student.prefix == "decoder":
        opening += tokenizer(prefix)["input_ids"][:-1]
    read = tokenizer(text if student.prefix == "decoder" else prefix + text, return_tensors="pt")
    ids, made = tokenizer(list(labels))["input_ids"], []
    for label in ids:
        with torch.no_grad():
            logits = model(**read, decoder_input_ids=torch.tensor([opening + label[:-1]])).logits[0]
        score = 0.0
        for at, token in enumerate(label):
            possible = sorted({other[at] for other in ids if other[:at] == label[:at]})
            score += float(logits[len(opening) - 1 + at, possible].log_softmax(0)[possible.index(token)])
        made.append(score)
    return torch.tensor(made).exp()


@pytest.mark.parametrize("prefix", ["encoder", "decoder"])
def test_confidence_is_the_probability_of_writing_that_label_and_no_other_text(closed: Predictor, prefix: str) -> None:
    student = Predictor(closed.model, closed.tokenizer, CHOICE, prefix=prefix)
    made = student.predict(["The lamp stopped working.", "x"], scores=True)[0]
    expected = constrained(student, "The lamp stopped working.", CHOICE.answer.labels)
    assert float(expected.sum()) == pytest.approx(1)
    assert made.scores == pytest.approx(dict(zip(CHOICE.answer.labels, expected.tolist(), strict=True)), rel=1e-4)
    assert made.label == CHOICE.answer.labels[int(expected.argmax())]
    assert made.confidence == pytest.approx(float(expected.max()), rel=1e-4)


def test_labels_that_begin_alike_are_told_apart_where_they_part() -> None:
    student = predictor(ROW_CHOICE)
    choices = [["a cold river", "a cold lake", "mall"], ["river", "a cold river bank", "a"], ["yes"]]
    for made, text, own in zip(
        student.predict(["Where?", "Which is it?", "So?"], choices, scores=True),
        ["Where?", "Which is it?", "So?"],
        choices,
        strict=True,
    ):
        expected = constrained(student, text, own)
        assert made.scores == pytest.approx(dict(zip(own, expected.tolist(), strict=True)), rel=1e-4)


def test_it_answers_what_hugging_face_writes_where_only_labels_may_be_written(closed: Predictor) -> None:
    model, tokenizer = closed.model.eval(), closed.tokenizer
    ids = tokenizer(list(CHOICE.answer.labels))["input_ids"]
    texts = ["The lamp stopped working.", "My dog chewed it.", "I changed my mind.", "Übergröße 🧾", "", "x " * 60]

    def possible(_: int, written: torch.Tensor) -> list[int]:
        so_far = written.tolist()[1:]
        goes_on = [label for label in ids if label[: len(so_far)] == so_far and label != so_far]
        return sorted({label[len(so_far)] for label in goes_on}) or [0]

    read = tokenizer([f"predict: {text}" for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**read, prefix_allowed_tokens_fn=possible, max_new_tokens=12, do_sample=False)
    expected = tokenizer.batch_decode(written, skip_special_tokens=True)
    assert [p.label for p in closed.predict(texts)] == expected


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


def test_an_expression_stays_one_whatever_the_student_would_rather_write() -> None:
    made = predictor(EXPRESSION)
    made.max_new_tokens = 24
    inputs = ["How many?", "How much? " * 9, "12 apples", "(3"]
    texts = [p.text for p in made.predict(inputs)]
    assert all(may_begin(text) for text in texts), texts
    made.arm = "rationale_first"
    assert len(made.predict(inputs)) == 4


def test_nothing_in_nothing_out(closed: Predictor) -> None:
    assert closed.predict([]) == []


def test_an_input_beyond_the_limit_is_cut_and_still_answered() -> None:
    short = predictor(CHOICE)
    short.max_input_tokens = 16
    assert short.predict(["word " * 5000])[0].label in CHOICE.answer.labels


@pytest.mark.parametrize("arm", ["standard", "rationale_first"])
@pytest.mark.parametrize("prefix", ["encoder", "decoder"])
def test_a_saved_student_answers_as_before(closed: Predictor, tmp_path: Path, arm: Arm, prefix: str) -> None:
    before = Predictor(closed.model, closed.tokenizer, CHOICE, 100, 12, arm, prefix)
    before.save(tmp_path)
    inputs = ["My dog chewed it.", "I changed my mind. " * 30]
    for made, other in zip(Predictor.open(tmp_path).predict(inputs), before.predict(inputs), strict=True):
        assert made == replace(other, confidence=made.confidence)
        assert made.confidence == pytest.approx(other.confidence, rel=1e-3)


def script(predictor: Predictor, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the model write fixed texts, one a row, whatever it reads: its logits leave but one token likely."""
    rows = [[i for part in text.split("⏎") for i in predictor.tokenizer(part)["input_ids"]] for text in texts]
    free = decoding._choose

    def scripted(logits: torch.Tensor, written: dict[int, list[int]], accepts: Any) -> Any:
        for at, made in written.items():
            own = next((row for row in rows if row[: len(made)] == made and (made or row is rows[at])), [])
            if len(made) < len(own):
                logits[at, own[len(made)]] += 1e4
        return free(logits, written, accepts)

    monkeypatch.setattr(decoding, "_choose", scripted)


def test_after_a_rationale_the_label_is_what_stands_between_two_ends(
    closed: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["It is faulty.⏎refund", "No idea.⏎maybe", "decline", "Long before.⏎repair"]
    made = Predictor(closed.model, closed.tokenizer, CHOICE, max_new_tokens=60, arm="rationale_first")
    script(made, texts, monkeypatch)
    predictions = made.predict(["a", "bb", "ccc", "dddd"])
    assert [p.label for p in predictions] == ["refund", None, None, "repair"]
    assert predictions[1].text == "maybe"
    assert predictions[0].confidence == pytest.approx(1.0, abs=1e-3)


def test_a_folder_that_is_no_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill\.json"):
        Predictor.open(tmp_path)
