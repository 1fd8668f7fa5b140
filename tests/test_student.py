"""The arms' targets, the loss by its definition, the order of the data."""

from collections import Counter

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipelines.draw import TrainRow
from pipelines.errors import UserError
from pipelines.recipe import resolve
from pipelines.student import Collator, load_student, multitask_loss, step_rows, task_loss

ROWS = [
    TrainRow("a", "The lamp stopped working.", "refund", "The lamp does not work, so it is faulty."),
    TrainRow("b", "I changed my mind.", "decline", "Nothing is wrong, so it is unwanted. It was bought 40 days ago."),
    TrainRow("c", "My dog chewed it.", "repair"),
]


@pytest.fixture(scope="module")
def student() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_student(resolve("builtin:quickstart/student"))
    return model.eval(), tokenizer


def collator(
    tokenizer: PreTrainedTokenizerBase, arm: str = "step_by_step", inputs: int = 64, targets: int = 64
) -> Collator:
    return Collator(tokenizer, arm, inputs, targets)


def texts(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    return [tokenizer.decode([i for i in row if i >= 0], skip_special_tokens=True) for row in ids.tolist()]


def test_two_tasks_from_one_input_told_apart_by_prefix(
    student: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    _, tokenizer = student
    batch = collator(tokenizer)(ROWS)
    assert texts(tokenizer, batch["label"]["input_ids"]) == [f"predict: {r.input}" for r in ROWS]
    assert texts(tokenizer, batch["label"]["labels"]) == ["refund", "decline", "repair"]
    assert texts(tokenizer, batch["rationale"]["input_ids"]) == [f"explain: {r.input}" for r in ROWS[:2]]
    assert texts(tokenizer, batch["rationale"]["labels"]) == [r.rationale for r in ROWS[:2]]


def test_standard_learns_labels_alone(student: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    assert set(collator(student[1], "standard")(ROWS)) == {"label"}


def test_targets_end_with_the_end_of_sequence(student: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    _, tokenizer = student
    cut = collator(tokenizer, targets=5)
    for row in cut(ROWS)["rationale"]["labels"].tolist():
        assert [i for i in row if i >= 0][-1] == tokenizer.eos_token_id
    assert cut.truncation.targets == 2


def test_truncated_inputs_are_counted(student: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    cut = collator(student[1], "standard", inputs=8)
    batch = cut([TrainRow("x", "word " * 500, "refund"), TrainRow("y", "", "refund")])
    assert batch["label"]["input_ids"].shape[1] == 8
    assert cut.truncation.inputs == 1


def test_loss_is_the_weighted_sum_of_two_mean_token_losses(
    student: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = student
    batch = collator(tokenizer)(ROWS)
    loss, parts = multitask_loss(model, batch, alpha=0.3)

    def plain(task: str) -> float:
        """Every row by itself, unpadded: the sum of its tokens' losses over the number of tokens."""
        total, tokens = 0.0, 0
        for row in range(len(batch[task]["labels"])):
            ids = batch[task]["input_ids"][row][batch[task]["attention_mask"][row].bool()]
            target = batch[task]["labels"][row][batch[task]["labels"][row] >= 0]
            logits = model(input_ids=ids[None], labels=target[None]).logits[0]
            total += functional.cross_entropy(logits, target, reduction="sum").item()
            tokens += len(target)
        return total / tokens

    assert parts["label_loss"] == pytest.approx(plain("label"), rel=1e-5)
    assert parts["rationale_loss"] == pytest.approx(plain("rationale"), rel=1e-5)
    assert loss.item() == pytest.approx(0.3 * plain("label") + 0.7 * plain("rationale"), rel=1e-5)


def test_a_batch_without_rationales_has_the_label_loss_alone(
    student: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = student
    batch = collator(tokenizer)(ROWS[2:])
    loss, parts = multitask_loss(model, batch, alpha=0.1)
    assert loss.item() == pytest.approx(task_loss(model, batch["label"]).item())
    assert set(parts) == {"label_loss"}


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
