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
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pipelines import t5
from pipelines.draw import TrainRow
from pipelines.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LABEL_PREFIX = "predict: "
RATIONALE_PREFIX = "explain: "


@dataclass(frozen=True)
class Batch:
    """The tensors of one step: the rows of the label task, after them those of the rationale task."""

    inputs: t5.Rows  # what the encoder reads
    previous: t5.Rows  # what the decoder has written before each target
    targets: torch.Tensor  # (target tokens,)
    label_tokens: int  # so many targets, the first ones, are labels'


@dataclass
class Truncation:
    """How many texts were cut to the limits."""

    inputs: int = 0
    targets: int = 0


def load_student(
    model: str, revision: str | None = None, init: str = "pretrained", dropout: float | None = None, seed: int = 0
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A T5-family model in fp32 and its tokenizer.

    Raises:
        UserError: not found, or not of the T5 family.
    """
    from transformers import (
        AutoConfig,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )  # seconds, and most who import us load none
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    local = {"revision": revision} if revision else {}
    try:
        config = AutoConfig.from_pretrained(model, **local)
        tokenizer = AutoTokenizer.from_pretrained(model, **local)
    except (OSError, ValueError) as error:
        raise UserError(f"student.model {model!r} can't be opened: {str(error).splitlines()[0]}") from error
    if config.model_type not in t5.FAMILY:
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
    """Rows → the batch of one step. Rows without a rationale have their label alone to learn."""

    def __init__(
        self,
        student: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        arm: str,
        max_input_tokens: int,
        max_target_tokens: int,
    ) -> None:
        self.student, self.tokenizer, self.arm = student, tokenizer, arm
        self.max_input_tokens, self.max_target_tokens = max_input_tokens, max_target_tokens
        self.truncation = Truncation()

    def __call__(self, rows: Sequence[TrainRow]) -> Batch:
        labels = [(LABEL_PREFIX + row.input, row.label) for row in rows]
        rationales = [(RATIONALE_PREFIX + row.input, row.rationale) for row in rows if row.rationale is not None]
        pairs = labels + (rationales if self.arm == "step_by_step" else [])
        inputs, cut_inputs = self._encode([source for source, _ in pairs], self.max_input_tokens)
        targets, cut_targets = self._encode([target for _, target in pairs], self.max_target_tokens)
        self.truncation.inputs += cut_inputs
        self.truncation.targets += cut_targets
        device, start = self.student.device, self.student.config.decoder_start_token_id
        return Batch(
            t5.Rows(inputs, device),
            t5.Rows([[start, *ids[:-1]] for ids in targets], device),
            torch.tensor([i for ids in targets for i in ids], device=device),
            sum(len(ids) for ids in targets[: len(rows)]),
        )

    def _encode(self, texts: list[str], limit: int) -> tuple[list[list[int]], int]:
        """Token ids, the last of which stays the end of the sequence, and how many texts were cut."""
        encoded: list[list[int]] = self.tokenizer(texts, truncation=False)["input_ids"]
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in encoded], sum(
            len(ids) > limit for ids in encoded
        )


class Objective(nn.Module):
    """A student with the loss that it learns by."""

    def __init__(self, student: "PreTrainedModel", alpha: float) -> None:
        super().__init__()
        self.student, self.alpha = student, alpha

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one step, and its parts for the log.

        Both tasks go through the student at once. A batch without rationales has the label loss alone, at full
        weight.
        """
        states = t5.encode(self.student, batch.inputs)
        visible = t5.causal(batch.previous.real.shape[1], batch.targets.device)
        logits = t5.decode(self.student, batch.previous, visible, states, batch.inputs)
        losses = functional.cross_entropy(logits.float(), batch.targets, reduction="none")
        label = losses[: batch.label_tokens].mean()
        if batch.label_tokens == len(losses):
            return label, {"label_loss": label.detach()}
        rationale = losses[batch.label_tokens :].mean()
        loss = self.alpha * label + (1 - self.alpha) * rationale
        return loss, {"label_loss": label.detach(), "rationale_loss": rationale.detach()}


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


def save_student(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """A plain Hugging Face directory."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
