"""The student in pure torch: model, arms, collator, loss. No Ray, no DeepSpeed.

Arms:
    standard       one task, the label
    step_by_step   two tasks from the same input, told apart by a prefix: `alpha * label loss +
                   (1 - alpha) * rationale loss`, each the mean over its own tokens
                   (Hsieh et al., Findings of ACL 2023, arXiv 2305.02301; the form of the reference code)
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pipelines.draw import TrainRow
from pipelines.errors import UserError

LABEL_PREFIX = "predict: "
RATIONALE_PREFIX = "explain: "
IGNORED = -100

Batch = dict[str, torch.Tensor]


@dataclass
class Truncation:
    """How many texts were cut to the limits."""

    inputs: int = 0
    targets: int = 0


def load_student(
    model: str, revision: str | None = None, init: str = "pretrained", dropout: float | None = None, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A T5-family model in fp32 and its tokenizer.

    Raises:
        UserError: not found, or not an encoder-decoder model.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    local = {"revision": revision} if revision else {}
    try:
        config = AutoConfig.from_pretrained(model, **local)
        tokenizer = AutoTokenizer.from_pretrained(model, **local)
    except (OSError, ValueError) as error:
        raise UserError(f"student.model {model!r} can't be opened: {str(error).splitlines()[0]}") from error
    if not config.is_encoder_decoder:
        raise UserError(f"student.model {model!r} is a {config.model_type}; a student must be of the T5 family")
    if dropout is not None:
        config.dropout_rate = dropout
    if init == "random":
        torch.manual_seed(seed)
        network = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    else:
        network = AutoModelForSeq2SeqLM.from_pretrained(model, config=config, dtype=torch.float32, **local)
    return network, tokenizer


class Collator:
    """Rows → the tensors of one step.

    `label` and `rationale` are batches of `input_ids` and `attention_mask` of shape (rows, input length) and
    `labels` of shape (rows, target length), -100 where there is nothing to learn. `rationale` covers only
    the rows that have one and is absent when none has.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, arm: str, max_input_tokens: int, max_target_tokens: int
    ) -> None:
        self.tokenizer, self.arm = tokenizer, arm
        self.max_input_tokens, self.max_target_tokens = max_input_tokens, max_target_tokens
        self.truncation = Truncation()

    def __call__(self, rows: Sequence[TrainRow]) -> dict[str, Batch]:
        batch = {"label": self._task(LABEL_PREFIX, [(r.input, r.label) for r in rows])}
        explained = [(r.input, r.rationale) for r in rows if r.rationale is not None]
        if self.arm == "step_by_step" and explained:
            batch["rationale"] = self._task(RATIONALE_PREFIX, explained)
        return batch

    def _task(self, prefix: str, pairs: list[tuple[str, str]]) -> Batch:
        inputs, cut_inputs = self._encode([prefix + source for source, _ in pairs], self.max_input_tokens)
        targets, cut_targets = self._encode([target for _, target in pairs], self.max_target_tokens)
        self.truncation.inputs += cut_inputs
        self.truncation.targets += cut_targets
        return {
            "input_ids": pad(inputs, self.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(ids) for ids in inputs], 0),
            "labels": pad(targets, IGNORED),
        }

    def _encode(self, texts: list[str], limit: int) -> tuple[list[list[int]], int]:
        """Token ids, the last of which stays the end of the sequence, and how many texts were cut."""
        encoded: list[list[int]] = self.tokenizer(texts, truncation=False)["input_ids"]
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in encoded], sum(
            len(ids) > limit for ids in encoded
        )


def multitask_loss(model: Any, batch: dict[str, Batch], alpha: float) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one step, and its parts for the log.

    A batch without rationales has the label loss alone, at full weight.
    """
    label = task_loss(model, batch["label"])
    if "rationale" not in batch:
        return label, {"label_loss": label.item()}
    rationale = task_loss(model, batch["rationale"])
    loss = alpha * label + (1 - alpha) * rationale
    return loss, {"label_loss": label.item(), "rationale_loss": rationale.item()}


def task_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the tokens of one task's targets."""
    logits = model(**batch).logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


@lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order in which an epoch sees its rows: every row once, another order each epoch."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def step_rows(rows: Sequence[TrainRow], seed: int, step: int, batch_size: int) -> list[TrainRow]:
    """The rows of one step (from 0): the same for any number of workers, and after any restart.

    Epochs follow each other without a gap, so a batch may span two.
    """
    places = (divmod(place, len(rows)) for place in range(step * batch_size, (step + 1) * batch_size))
    return [rows[epoch_order(len(rows), seed, epoch)[at]] for epoch, at in places]


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of ids as one tensor, padded to the longest."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *([value] * (width - len(row)))] for row in rows])


def save_student(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A plain Hugging Face directory."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
