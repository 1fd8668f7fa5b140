"""The arms' targets, the loss by its definition, the order of the data."""

from collections import Counter
from typing import Any

import pytest
import torch

from pipelines.draw import TrainRow
from pipelines.errors import UserError
from pipelines.recipe import resolve
from pipelines.student import Batch, Collator, Objective, load_student, step_rows

pytestmark = pytest.mark.slow  # it loads transformers

Student = tuple[Any, Any]  # model and tokenizer

ROWS = [
    TrainRow("a", "The lamp stopped working.", "refund", "The lamp does not work, so it is faulty."),
    TrainRow("b", "I changed my mind.", "decline", "Nothing is wrong, so it is unwanted. It was bought 40 days ago."),
    TrainRow("c", "My dog chewed it.", "repair"),
]


@pytest.fixture(scope="module")
def student() -> Student:
    model, tokenizer = load_student(resolve("builtin:quickstart/student"))
    return model.eval(), tokenizer


def collator(student: Student, arm: str = "step_by_step", inputs: int = 64, targets: int = 64) -> Collator:
    return Collator(*student, arm, inputs, targets)


def read(student: Student, batch: Batch) -> list[tuple[str, str]]:
    """(input, target) of every row, as text."""
    sources = batch.inputs.ids.split(batch.inputs.lengths)
    targets = batch.targets.split(batch.previous.lengths)
    return [
        tuple(student[1].decode(ids, skip_special_tokens=True) for ids in pair)
        for pair in zip(sources, targets, strict=True)
    ]


def test_two_tasks_from_one_input_told_apart_by_prefix(student: Student) -> None:
    labels = [("predict: The lamp stopped working.", "refund"), ("predict: I changed my mind.", "decline")]
    labels.append(("predict: My dog chewed it.", "repair"))
    rationales = [(f"explain: {row.input}", row.rationale) for row in ROWS[:2]]
    batch = collator(student)(ROWS)
    assert read(student, batch) == labels + rationales
    assert batch.label_tokens == sum(batch.previous.lengths[:3])


def test_standard_learns_labels_alone(student: Student) -> None:
    batch = collator(student, "standard")(ROWS)
    assert [target for _, target in read(student, batch)] == ["refund", "decline", "repair"]
    assert batch.label_tokens == len(batch.targets)


def test_the_decoder_sees_what_comes_before_each_target(student: Student) -> None:
    batch = collator(student)(ROWS)
    previous = batch.previous.ids.split(batch.previous.lengths)
    for before, target in zip(previous, batch.targets.split(batch.previous.lengths), strict=True):
        assert before.tolist() == [student[0].config.decoder_start_token_id, *target[:-1].tolist()]


def test_targets_end_with_the_end_of_sequence(student: Student) -> None:
    cut = collator(student, targets=5)
    batch = cut(ROWS)
    ends = [row[-1].item() for row in batch.targets.split(batch.previous.lengths)]
    assert ends == [student[1].eos_token_id] * 5
    assert batch.previous.lengths[-2:] == [5, 5]
    assert cut.truncation.targets == 2


def test_truncated_inputs_are_counted(student: Student) -> None:
    cut = collator(student, "standard", inputs=8)
    batch = cut([TrainRow("x", "word " * 500, "refund"), TrainRow("y", "", "refund")])
    assert batch.inputs.lengths[0] == 8
    assert cut.truncation.inputs == 1


def defined_loss(student: Student, rows: list[TrainRow], alpha: float) -> torch.Tensor:
    """`alpha * label loss + (1 - alpha) * rationale loss` to the letter: two passes of the model's own forward, each
    over padded rows, each loss the mean over its tokens."""
    model, tokenizer = student

    def task(prefix: str, pairs: list[tuple[str, str]]) -> torch.Tensor:
        inputs = tokenizer([prefix + source for source, _ in pairs], padding=True, return_tensors="pt")
        targets = tokenizer([target for _, target in pairs], padding=True, return_tensors="pt")
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
        loss: torch.Tensor = model(**inputs, labels=labels).loss
        return loss

    label = task("predict: ", [(row.input, row.label) for row in rows])
    rationale = task("explain: ", [(row.input, row.rationale) for row in rows if row.rationale is not None])
    return alpha * label + (1 - alpha) * rationale


@pytest.mark.parametrize("alpha", [0.3, 0.0, 1.0])
def test_loss_and_gradients_are_those_of_the_definition(student: Student, alpha: float) -> None:
    model = student[0]
    expected = defined_loss(student, ROWS, alpha)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss, parts = Objective(model, alpha)(collator(student)(ROWS))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert alpha * parts["label_loss"] + (1 - alpha) * parts["rationale_loss"] == pytest.approx(loss.item())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name
    model.zero_grad()


def test_a_batch_without_rationales_has_the_label_loss_alone(student: Student) -> None:
    loss, parts = Objective(student[0], alpha=0.1)(collator(student)(ROWS[2:]))
    standard, _ = Objective(student[0], alpha=0.9)(collator(student, "standard")(ROWS[2:]))
    assert loss.item() == standard.item() == parts["label_loss"].item()
    assert set(parts) == {"label_loss"}


def test_any_size_of_batch_is_one_pass_of_each_half(student: Student) -> None:
    """Under ZeRO 3 every worker must run as many passes, whatever its rows."""
    model = student[0]
    passes: list[str] = []
    hooks = [
        stack.embed_tokens.register_forward_hook(lambda *_, name=name: passes.append(name))
        for name, stack in (("encoder", model.get_encoder()), ("decoder", model.get_decoder()))
    ]
    for rows in (ROWS, ROWS[2:]):
        Objective(model, alpha=0.5)(collator(student)(rows))
    for hook in hooks:
        hook.remove()
    assert passes == ["encoder", "decoder"] * 2


def test_every_epoch_sees_every_row_once() -> None:
    rows = [TrainRow(str(i), "", "") for i in range(10)]
    seen = [row.row_id for step in range(5) for row in step_rows(rows, seed=1, step=step, batch_size=4)]
    assert Counter(seen) == Counter({str(i): 2 for i in range(10)})
    assert seen[:10] != seen[10:]


def test_order_depends_on_the_seed_alone() -> None:
    rows = [TrainRow(str(i), "", "") for i in range(50)]
    again = [step_rows(rows, seed, step=3, batch_size=8) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_random_initialisation_keeps_the_shape_and_follows_the_seed() -> None:
    path = resolve("builtin:quickstart/student")
    models = [load_student(path, init="random", seed=seed)[0] for seed in (1, 1, 2)]
    weights = [m.get_input_embeddings().weight for m in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_decoder_only_model_is_refused() -> None:
    with pytest.raises(UserError, match="llama; a student must be of the T5 family"):
        load_student(resolve("builtin:quickstart/teacher"))


def test_a_missing_model_is_refused_with_its_name() -> None:
    with pytest.raises(UserError, match="absent"):
        load_student("./absent")
