"""Label-only inference: no Ray, no teacher, no rationale.

Closed sets (`choice`, `row_choice`) are scored: the student chooses wherever the labels part (`label_tree`), and a
label's probability is the product of the choices that lead to it, so the answer is always valid. Expressions and free
text are decoded greedily; of an expression no token is taken that would keep it from being one, so only where
`max_new_tokens` cut it short it is none.

One of arm rationale_first can't answer before it has written its rationale, so it writes both.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from pipelines import decoding, t5
from pipelines.bundle import SIDECAR, Bundle, Precision, read_bundle
from pipelines.fused import fuse, pack
from pipelines.label_tree import LabelTree, label_tree
from pipelines.quantized import quantize
from pipelines.recipe import Arm
from pipelines.student import (
    LABEL_PREFIX,
    RATIONALE_PREFIX,
    decoder_opening,
    load_student,
    save_student,
)
from pipelines.tasks import Task
from pipelines.tasks.expression import may_begin

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prediction:
    """A label and the probability that the student gives it. `label` is None when a decoded text is no
    valid answer; it then stands in `text`. `scores` are the probabilities of all labels of a closed set, where they
    were asked for; an answer whose confidence is below the bundle's threshold is marked `abstained`."""

    label: str | None
    confidence: float
    text: str
    abstained: bool = False
    scores: Mapping[str, float] | None = None


class Predictor:
    """A student and its task. `predict` is deterministic and needs no gradient."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        task: Task,
        max_input_tokens: int = 1024,
        max_new_tokens: int = 64,
        arm: Arm = "standard",
        prefix: str = "encoder",
        bundle: Bundle | None = None,
    ) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.max_input_tokens, self.max_new_tokens = max_input_tokens, max_new_tokens
        self.arm, self.prefix = arm, prefix
        self.bundle = bundle
        self.all_done: Callable[[bool], bool] = bool  # see `decoding.write`

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu", precision: Precision | None = None) -> Self:
        """Load a student's directory or a bundle to answer with; it can't be saved or trained. A bundle's files are
        checked against their sums first, and it runs in the precision that it was exported in, or in fp32 where the
        processor lacks that, if no other is asked for. Weights are read from safetensors alone.

        Raises:
            UserError: it is neither, or a file of the bundle is not what was exported.
        """
        read = read_bundle(folder)
        model, tokenizer = load_student(str(folder), local_files_only=True, safetensors=True)
        made = cls(model.eval(), tokenizer, read.task, **read.settings, bundle=read.bundle)
        if precision is None:
            precision = read.bundle.precision if read.bundle and can_run(read.bundle.precision, device) else "fp32"
        made._prepare(precision, device)
        return made

    def _prepare(self, precision: Precision, device: str) -> None:
        """Put the fastest layers for that precision in the place of the model's own."""
        stacks = (self.model.get_encoder(), self.model.get_decoder())
        fuse(self.model)
        if precision == "bf16":
            self.model.to(torch.bfloat16)
        elif precision == "int8":  # all but the vocabulary, which few tokens meet and confidence hangs on
            for stack in stacks:
                quantize(stack)
        self.model.to(device)
        if torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available() and can_run(precision):
            for part in stacks if self._scored else (self.model,):  # of labels, few tokens' logits are wanted
                pack(part)

    def save(self, folder: str | Path) -> None:
        """Write a student's directory, which `open` reads once a bundle has its sums too. Not of one that was
        opened."""
        save_student(self.model, self.tokenizer, Path(folder))
        self.describe(folder)

    def describe(self, folder: str | Path) -> None:
        """Write what stands beside the weights: the task, and how answers are made of them."""
        facts = {
            "task": self.task.model_dump(mode="json"),
            "max_input_tokens": self.max_input_tokens,
            "max_new_tokens": self.max_new_tokens,
            "arm": self.arm,
            "prefix": self.prefix,
            **({"bundle": asdict(self.bundle)} if self.bundle else {}),
        }
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        Path(folder, SIDECAR).write_text(text, encoding="utf-8")

    def predict(
        self,
        inputs: Sequence[str],
        choices: Sequence[Sequence[str] | None] | None = None,
        batch_size: int = 64,
        scores: bool = False,
    ) -> list[Prediction]:
        """Labels for rendered inputs, in their order. `choices` are the rows' own, for kind row_choice."""
        return self.predict_ids(self.read(inputs), choices, batch_size, scores)

    def read(self, inputs: Sequence[str], prefix: str = LABEL_PREFIX) -> list[list[int]]:
        """The token ids of rendered inputs, with their prefix, as the encoder gets them; cut to `max_input_tokens`."""
        told = prefix if self.prefix == "encoder" else ""
        ids = self.tokenizer([told + text for text in inputs])["input_ids"] if inputs else []
        room = self.max_input_tokens
        return [row if len(row) <= room else [*row[: room - 1], row[-1]] for row in ids]

    def predict_ids(
        self,
        ids: Sequence[list[int]],
        choices: Sequence[Sequence[str] | None] | None = None,
        batch_size: int = 64,
        scores: bool = False,
    ) -> list[Prediction]:
        """Labels for what `read` made, in its order."""
        own = choices or [None] * len(ids)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # batches of like length waste less
        predictions: dict[int, Prediction] = {}
        with self._at_rest():
            for at in range(0, len(order), batch_size):
                part = order[at : at + batch_size]
                rows = t5.Rows([ids[i] for i in part], self.model.device, filled=True)
                predictions.update(zip(part, self._predict_batch(rows, [own[i] for i in part], scores), strict=True))
        return [predictions[i] for i in range(len(ids))]

    def explain(self, inputs: Sequence[str], max_new_tokens: int = 128) -> list[str]:
        """What the student writes as rationales, greedily. Only for one that was taught to, and for people to look at:
        no prediction needs it."""
        with self._at_rest():
            rows = t5.Rows(self.read(inputs, RATIONALE_PREFIX), self.model.device)
            made = self._write(rows, RATIONALE_PREFIX, max_new_tokens)
        ids = [row.ids for row in made]
        return [str(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @property
    def _scored(self) -> bool:
        """Whether labels are scored, and no text is written."""
        return self.task.answer.kind in ("choice", "row_choice") and self.arm != "rationale_first"

    @cached_property
    def _tree(self) -> LabelTree:
        """Of the task's own labels."""
        return label_tree(self.tokenizer(list(self.task.answer.labels))["input_ids"])

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Without dropout and gradients; a model in training goes on as it was."""
        training = self.model.training
        if training:  # it takes a millisecond to tell all layers
            self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            if training:
                self.model.train()

    def _predict_batch(
        self, inputs: t5.Rows, choices: list[Sequence[str] | None], scores: bool
    ) -> Iterator[Prediction]:
        if self.arm == "rationale_first":
            return self._decode_after_rationale(inputs, choices)
        if self._scored:
            labels = [tuple(dict.fromkeys(own or self.task.answer.labels)) for own in choices]
            return self._score(inputs, labels, scores)
        return self._decode(inputs)

    def _start(self, prefix: str) -> list[int]:
        """What the decoder is given before it writes."""
        opening = decoder_opening(self.tokenizer, prefix) if self.prefix == "decoder" else []
        return [self.model.config.decoder_start_token_id, *opening]

    def _score(self, inputs: t5.Rows, labels: list[tuple[str, ...]], all_scores: bool) -> Iterator[Prediction]:
        """Each row's likeliest label."""
        for row, scores in zip(labels, self._label_scores(inputs, labels), strict=True):
            probabilities = (scores / self._temperature).softmax(dim=0).tolist()
            confidence, label = max(zip(probabilities, row, strict=True), key=itemgetter(0))
            shown = dict(zip(row, probabilities, strict=True)) if all_scores else None
            yield Prediction(label, confidence, label, self._abstains(confidence), shown)

    def _label_scores(self, inputs: t5.Rows, labels: list[tuple[str, ...]]) -> Sequence[torch.Tensor]:
        """The log-probabilities of each row's labels, by the choices that make them; one pass of encoder and decoder.

        The decoder row of an input holds what comes before each parting of its labels, one after another, each seeing
        itself alone; so the input is attended to once and not once a label.
        """
        device, start = self.model.device, self._start(LABEL_PREFIX)
        trees = self._trees(labels)
        rows = [[[*start, *prefix] for prefix in tree.prefixes] for tree in trees]
        previous = t5.Rows([[i for text in texts for i in text] for texts in rows], device)
        lengths = [len(text) for texts in rows for text in texts]
        visible = t5.apart(previous, lengths)
        if len(set(labels)) == 1:
            visible = visible[:1]  # it is alike in all rows
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        choices = [some for tree in trees for some in tree.nexts]
        tokens = list(dict.fromkeys(token for some in choices for token in some))
        column = {token: at for at, token in enumerate(tokens)}
        possible = torch.zeros(len(choices), len(tokens), dtype=torch.bool)
        possible[_places((row, column[token]) for row, some in enumerate(choices) for token in some)] = True
        states, wanted = t5.encode(self.model, inputs), torch.tensor(tokens).to(device)
        logits = t5.decode(self.model, previous, visible, states, inputs, ends, tokens=wanted)
        logs = logits.float().cpu().masked_fill_(~possible, -torch.inf).log_softmax(dim=1)
        first = accumulate((len(tree.prefixes) for tree in trees), initial=0)
        ways = [(at, steps) for tree, at in zip(trees, first, strict=False) for steps in tree.steps]  # one a label
        taken = logs[_places((at + place, column[token]) for at, steps in ways for place, token in steps)]
        label_of = torch.tensor([number for number, (_, steps) in enumerate(ways) for _ in steps])
        scores = torch.zeros(len(ways)).index_add(0, label_of, taken)
        by_row: tuple[torch.Tensor, ...] = scores.split([len(row) for row in labels])
        return by_row

    def _trees(self, labels: list[tuple[str, ...]]) -> list[LabelTree]:
        """Each row's labels as a tree; that of the task's own is kept."""
        own = tuple(self.task.answer.labels)
        other = dict.fromkeys(label for row in set(labels) - {own} for label in row)
        ids = dict(zip(other, self.tokenizer(list(other))["input_ids"], strict=True)) if other else {}
        made = {row: self._tree if row == own else label_tree([ids[label] for label in row]) for row in set(labels)}
        return [made[row] for row in labels]

    def _decode(self, inputs: t5.Rows) -> Iterator[Prediction]:
        """Greedy text; its confidence is the probability of the whole text."""
        made = self._write(inputs, LABEL_PREFIX, self.max_new_tokens, accepts=self._accepts())
        texts = self.tokenizer.batch_decode([row.ids for row in made], skip_special_tokens=True)
        for text, row in zip(texts, made, strict=True):
            yield self._written(text, math.exp(sum(row.log_probabilities)), None)

    def _decode_after_rationale(self, inputs: t5.Rows, choices: list[Sequence[str] | None]) -> Iterator[Prediction]:
        """Greedy text up to the second end of sequence: the rationale, then the label. Its confidence is the
        probability of the label after that rationale; none, if it came to no label."""
        accepts = self._accepts(after_end=True)
        for row, own in zip(self._write(inputs, LABEL_PREFIX, self.max_new_tokens, 2, accepts), choices, strict=True):
            label = self._label_at(row.ids)
            text = self.tokenizer.decode(row.ids[label:], skip_special_tokens=True)
            probability = math.exp(sum(row.log_probabilities[label:])) if row.ids[label:] else 0.0
            yield self._written(text, probability, own)

    def _label_at(self, ids: list[int]) -> int:
        """Where the label begins in what was written: after the rationale's end of sequence."""
        end = self.tokenizer.eos_token_id
        return ids.index(end) + 1 if end in ids else len(ids)

    def _accepts(self, after_end: bool = False) -> Callable[[list[int]], bool] | None:
        """Whether a row may be written like this, so that an expression stays one; with `after_end`, whether its
        part after an end of sequence may."""
        if self.task.answer.kind != "expression":
            return None
        end = self.tokenizer.eos_token_id

        def accepts(ids: list[int]) -> bool:
            own = ids[self._label_at(ids) :] if after_end else ids
            if not own:
                return True
            text = self.tokenizer.decode(own, skip_special_tokens=True)
            return self.task.canonical(text) is not None if own[-1] == end else may_begin(text)

        return accepts

    def _written(self, text: str, probability: float, choices: Sequence[str] | None) -> Prediction:
        """A decoded text of that probability as a prediction; with its calibrated confidence."""
        this, other = (p ** (1 / self._temperature) for p in (probability, max(0.0, 1 - probability)))
        confidence = this / (this + other)
        return Prediction(self.task.canonical(text, choices), confidence, text, self._abstains(confidence))

    @property
    def _temperature(self) -> float:
        return self.bundle.temperature if self.bundle else 1.0

    def _abstains(self, confidence: float) -> bool:
        return self.bundle is not None and confidence < self.bundle.abstain_below

    def _write(
        self,
        inputs: t5.Rows,
        prefix: str,
        max_new_tokens: int,
        ends: int = 1,
        accepts: Callable[[list[int]], bool] | None = None,
    ) -> list[decoding.Written]:
        """What the decoder writes greedily after `prefix`, up to so many ends of sequence."""
        start, end = self._start(prefix), self.tokenizer.eos_token_id
        return decoding.write(self.model, inputs, start, end, max_new_tokens, ends, accepts, self.all_done)


def _places(pairs: Iterable[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """Rows and columns, as a matrix is indexed by them."""
    return torch.tensor(list(pairs)).unbind(1)


def can_run(precision: Precision, device: str = "cpu") -> bool:
    """Whether the processor has matrix products in that precision; without them it is slower than fp32."""
    if torch.device(device).type == "cuda":
        return precision == "fp32" or (
            precision == "bf16" and bool(torch.cuda.is_bf16_supported(including_emulation=False))
        )
    known = torch.cpu.get_capabilities()
    needs = {"fp32": (), "bf16": ("avx512_bf16", "amx_bf16", "bf16"), "int8": ("avx2",)}[precision]
    return precision == "fp32" or any(known.get(name, False) for name in needs)
