"""The student in pure torch: model, arms, collator, loss. No Ray, no DeepSpeed.

Arms, and what they learn from an input (`⏎` is the end of sequence):
    standard            `predict: <input>` → `<label>⏎`
    step_by_step        `predict: <input>` → `<label>⏎` and `explain: <input>` → `<rationale>⏎`, two tasks of one
                        loss (Hsieh et al., Findings of ACL 2023, arXiv 2305.02301; alpha as in its reference code)
    shuffled_rationale  the same, the rationale's tokens in random order: the control for what rationales mean
    rationale_first     `predict: <input>` → `<rationale>⏎<label>⏎`
    label_first         `predict: <input>` → `<label>⏎<rationale>⏎` (arXiv 2406.14511); reading ends at the first `⏎`
With `prefix: decoder` the two-task arms read the bare input once, and the decoder begins with the prefix.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines import t5
from pipelines.draw import Rationale, TrainRow
from pipelines.errors import UserError
from pipelines.onednn import fuse_gelu, use_onednn
from pipelines.recipe import ONE_TARGET, Arm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LABEL_PREFIX = "predict: "
RATIONALE_PREFIX = "explain: "
LABEL, RATIONALE = 0, 1  # the two tasks


@dataclass(frozen=True)
class Batch:
    """The tensors of one step, or of one part of it."""

    inputs: t5.Rows  # what the encoder reads
    previous: t5.Rows  # what the decoder has written before each of its tokens
    visible: torch.Tensor  # see `t5.decode`
    places: torch.Tensor | None  # (targets,): the tokens of `previous` that a target follows; None: every one
    targets: torch.Tensor  # (targets,)
    tasks: torch.Tensor  # (targets,): LABEL or RATIONALE
    weights: torch.Tensor  # (targets,): of a target within the mean of its task

    @property
    def tokens(self) -> tuple[int, int]:
        """How many the encoder reads, and how many targets there are."""
        return len(self.inputs.ids), len(self.targets)

    def totals(self) -> torch.Tensor:
        """The sum of weights of each task, of shape (2,)."""
        return self._by_task(self.weights)

    def loss_sums(self, logits: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each task's token losses, of shape (2,)."""
        return self._by_task(-t5.log_probabilities(logits, self.targets) * self.weights)

    def _by_task(self, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(2).index_add(0, self.tasks, values)


@dataclass(frozen=True)
class _Text:
    """One thing to write: `opening` is given to the decoder, `target` is learnt."""

    target: list[int]
    task: int
    weight: float
    opening: Sequence[int] = ()


def load_student(
    model: str,
    revision: str | None = None,
    init: str = "pretrained",
    dropout: float | None = None,
    seed: int = 0,
    local_files_only: bool = False,
    safetensors: bool = False,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A T5-family model in fp32 and its tokenizer. With `safetensors`, weights in any other format are refused.

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
    local: dict[str, Any] = {"local_files_only": local_files_only, **({"revision": revision} if revision else {})}
    try:
        config = AutoConfig.from_pretrained(model, **local)
        if config.model_type not in t5.FAMILY:
            raise UserError(
                f"student.model {model!r} is a {config.model_type}; a student must be an encoder-decoder of the T5 "
                "family (T5, v1.1, Flan-T5, mT5, ByT5), e.g. google/flan-t5-base"
            )
        tokenizer = AutoTokenizer.from_pretrained(model, **local)
    except (OSError, ValueError) as error:
        raise UserError(f"student.model {model!r} can't be opened: {str(error).splitlines()[0]}") from error
    if dropout is not None:
        config.dropout_rate = dropout
    if init == "random":
        torch.manual_seed(seed)
        network = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
        if not getattr(config, "scale_decoder_outputs", config.model_type != "mt5"):
            _untie(network)
    else:
        only = {"use_safetensors": True} if safetensors else {}
        network = AutoModelForSeq2SeqLM.from_pretrained(model, config=config, dtype=torch.float32, **only, **local)
    return network, tokenizer


def _untie(network: Any) -> None:
    """Give the model an output layer of its own, as v1.1 and mT5 have. transformers 5 ties it in every T5 that is
    built from its config alone."""
    head = torch.empty_like(network.lm_head.weight).normal_(std=network.config.initializer_factor)
    network.lm_head.weight = nn.Parameter(head)


class Collator:
    """Rows → the batch of one step. Rows without a rationale have their label alone to learn.

    Args:
        student: for its device and its config.
        tokenizer: the student's.
        arm: what the targets are.
        max_input_tokens: longer inputs are cut; `count_cut` says how many.
        max_target_tokens: longer rationales are cut.
        prefix: `encoder` or `decoder`, where the task is told.
        teachers: if given, each has a task of its own, by its place in here.
        by_agreement: whether texts count by their agreement.
        seed: of the shuffled rationales.
    """

    def __init__(
        self,
        student: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        arm: Arm,
        max_input_tokens: int,
        max_target_tokens: int,
        prefix: str = "encoder",
        teachers: Sequence[str] = (),
        by_agreement: bool = False,
        seed: int = 0,
    ) -> None:
        self.student, self.tokenizer, self.arm = student, tokenizer, arm
        self.max_input_tokens, self.max_target_tokens = max_input_tokens, max_target_tokens
        self.prefix, self.teachers, self.by_agreement, self.seed = prefix, tuple(teachers), by_agreement, seed

    def __call__(self, rows: Sequence[TrainRow]) -> Batch:
        if self.arm in ONE_TARGET:
            texts = [[self._joined(row)] for row in rows]
            return self._batch([LABEL_PREFIX + row.input for row in rows], texts)
        labels = [self._label(row) for row in rows]
        rationales = [[self._rationale(row, r) for r in row.rationales] for row in rows]
        if self.prefix == "decoder":
            return self._batch(
                [row.input for row in rows], [[label, *own] for label, own in zip(labels, rationales, strict=True)]
            )
        sources = [LABEL_PREFIX + row.input for row in rows]
        sources += [self.rationale_prefix(r.teacher) + row.input for row in rows for r in row.rationales]
        return self._batch(sources, [[text] for text in chain(labels, *rationales)])

    def rationale_prefix(self, teacher: str) -> str:
        """What asks for a rationale: of this teacher, where each has a task of its own."""
        return f"explain as teacher {self.teachers.index(teacher) + 1}: " if self.teachers else RATIONALE_PREFIX

    def count_cut(self, rows: Sequence[TrainRow]) -> tuple[int, int]:
        """How many rows have an input, and how many a rationale, beyond the limits.

        Raises:
            UserError: a label is: cut, it would be another.
        """
        inputs = self.tokenizer([RATIONALE_PREFIX + row.input for row in rows])["input_ids"]
        for row, ids in zip(rows, self.tokenizer([row.label for row in rows])["input_ids"], strict=True):
            if len(ids) > self.max_target_tokens:
                raise UserError(
                    f"row {row.row_id}: its label has {len(ids)} tokens and student.max_target_tokens is "
                    f"{self.max_target_tokens}; raise that ({row.label[:60]!r})"
                )
        room = self.max_target_tokens
        cut = [any(len(ids) > room for ids in self._encode([r.text for r in row.rationales])) for row in rows]
        return sum(len(ids) > self.max_input_tokens for ids in inputs), sum(cut)

    def _batch(self, sources: list[str], texts: list[list[_Text]]) -> Batch:
        """`sources` go to the encoder; `texts` are what the decoder writes of each, apart from one another."""
        device, start = self.student.device, self.student.config.decoder_start_token_id
        inputs = [_cut(ids, self.max_input_tokens) for ids in self._encode(sources)]
        written = [text for of_row in texts for text in of_row]
        rows = [[i for text in of_row for i in (start, *text.opening, *text.target[:-1])] for of_row in texts]
        previous = t5.Rows(rows, device)
        apart = any(len(of_row) > 1 for of_row in texts)
        lengths = [len(text.opening) + len(text.target) for text in written]
        openings = [len(text.opening) for text in written]
        return Batch(
            t5.Rows(inputs, device),
            previous,
            t5.apart(previous, lengths) if apart else t5.causal(previous.real.shape[1], device),
            _after_openings(openings, lengths).to(device) if any(openings) else None,
            torch.tensor([i for text in written for i in text.target], device=device),
            torch.tensor([text.task for text in written for _ in text.target], device=device),
            torch.tensor([text.weight for text in written for _ in text.target], device=device),
        )

    def _label(self, row: TrainRow) -> _Text:
        weight = row.agreement if self.by_agreement else 1.0
        return _Text(self._ids(row.label), LABEL, weight, self._opening(LABEL_PREFIX))

    def _rationale(self, row: TrainRow, rationale: Rationale) -> _Text:
        target = _cut(self._ids(rationale.text), self.max_target_tokens)
        if self.arm == "shuffled_rationale":
            body = target[:-1]
            random.Random(f"{self.seed}/{row.row_id}").shuffle(body)
            target = [*body, target[-1]]
        weight = rationale.agreement if self.by_agreement else 1.0
        return _Text(target, RATIONALE, weight, self._opening(self.rationale_prefix(rationale.teacher)))

    def _joined(self, row: TrainRow) -> _Text:
        """Label and rationale as one target. The limit is the rationale's own, so that no label is lost by it."""
        label = self._ids(row.label)
        rationale = _cut(self._ids(row.rationales[0].text), self.max_target_tokens) if row.rationales else []
        target = rationale + label if self.arm == "rationale_first" else label + rationale
        return _Text(target, LABEL, row.agreement if self.by_agreement else 1.0)

    def _opening(self, prefix: str) -> list[int]:
        return decoder_opening(self.tokenizer, prefix) if self.prefix == "decoder" else []

    def _ids(self, text: str) -> list[int]:
        return self._encode([text])[0]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self.tokenizer(texts)["input_ids"] if texts else []
        return encoded


def decoder_opening(tokenizer: "PreTrainedTokenizerBase", prefix: str) -> list[int]:
    """The tokens of a prefix, without the end of sequence."""
    ids: list[int] = tokenizer(prefix)["input_ids"]
    return ids[:-1]


def _cut(ids: list[int], limit: int) -> list[int]:
    """Token ids, the last of which stays the end of the sequence."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def _after_openings(openings: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """The places that a target follows, of texts that lie end to end: all but those of the openings."""
    places: list[int] = []
    at = 0
    for opening, length in zip(openings, lengths, strict=True):
        places += range(at + opening, at + length)
        at += length
    return torch.tensor(places)


class Objective(nn.Module):
    """A student with the loss that it learns by: `alpha * label loss + (1 - alpha) * rationale loss`."""

    def __init__(self, student: "PreTrainedModel", alpha: float) -> None:
        super().__init__()
        fuse_gelu(student)
        use_onednn(student)
        self.student, self.alpha = student, alpha

    def forward(self, batch: Batch, totals: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A part's share of the loss of a whole step, and its sums for the log. All its tasks go through the student at
        once.

        Each task's loss is the mean over its own tokens, of all parts: the shares of a step add up to its loss,
        however it is divided among workers. A step without rationales has the label loss alone, at full weight.

        Args:
            batch: the part.
            totals: the sum of `Batch.totals()` over all parts of the step; None: there is but this one.
        """
        read, written = t5.embed(self.student, batch.inputs, batch.previous)
        states = t5.encode(self.student, batch.inputs, read)
        logits = t5.decode(self.student, batch.previous, batch.visible, states, batch.inputs, batch.places, written)
        sums = batch.loss_sums(logits)
        share = self._weights(batch.totals() if totals is None else totals)
        return (share * sums).sum(), sums.detach()

    def _weights(self, totals: torch.Tensor) -> torch.Tensor:
        """What a unit of each task's sum adds to the loss."""
        means = torch.where(totals > 0, 1 / totals, 0.0)
        alpha = torch.where(totals[RATIONALE] > 0, self.alpha, 1.0)
        return torch.stack([alpha * means[LABEL], (1 - alpha) * means[RATIONALE]])

    def losses(self, sums: torch.Tensor, totals: torch.Tensor) -> dict[str, float]:
        """What a step's sums and totals, over all parts, come to: the loss, and where there are two tasks, theirs."""
        loss = float((self._weights(totals) * sums).sum())
        if totals[RATIONALE] == 0:
            return {"loss": loss}
        label, rationale = (sums / totals).tolist()
        return {"loss": loss, "label_loss": label, "rationale_loss": rationale}


def save_student(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """A plain Hugging Face directory."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
