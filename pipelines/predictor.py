"""Label-only inference: no Ray, no teacher, no rationale.

Closed sets (`choice`, `row_choice`) are scored: the probability of each label as a whole, so the answer is
always valid. Expressions and free text are decoded greedily.

A student's directory is a Hugging Face one with `distill.json` beside it: the task, and the prefix that
asks for the label.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from pipelines import t5
from pipelines.errors import UserError
from pipelines.student import LABEL_PREFIX, load_student
from pipelines.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIDECAR = "distill.json"


@dataclass(frozen=True)
class Prediction:
    """A label and the probability that the student gives it. `label` is None when a decoded text is no
    valid answer; it then stands in `text`."""

    label: str | None
    confidence: float
    text: str


class Predictor:
    """A student and its task. `predict` is deterministic and needs no gradient."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        task: Task,
        max_input_tokens: int = 1024,
        max_new_tokens: int = 64,
    ) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.max_input_tokens, self.max_new_tokens = max_input_tokens, max_new_tokens

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu") -> Self:
        """Load a student's directory.

        Raises:
            UserError: it is no student's directory.
        """
        path = Path(folder) / SIDECAR
        if not path.is_file():
            raise UserError(f"{folder}: no {SIDECAR} in it; give the directory of a student that `distill train` made")
        facts = json.loads(path.read_text(encoding="utf-8"))
        model, tokenizer = load_student(str(folder))
        model.to(device)
        return cls(model.eval(), tokenizer, Task.model_validate(facts["task"]), facts["max_input_tokens"])

    def predict(
        self, inputs: Sequence[str], choices: Sequence[Sequence[str] | None] | None = None, batch_size: int = 64
    ) -> list[Prediction]:
        """Labels for rendered inputs, in their order. `choices` are the rows' own, for kind row_choice."""
        own = choices or [None] * len(inputs)
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))  # batches of like length waste less
        predictions: dict[int, Prediction] = {}
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            for at in range(0, len(order), batch_size):
                part = order[at : at + batch_size]
                made = self._predict_batch([inputs[i] for i in part], [own[i] for i in part])
                predictions.update(zip(part, made, strict=True))
        self.model.train(was_training)
        return [predictions[i] for i in range(len(inputs))]

    def _predict_batch(self, texts: list[str], choices: list[Sequence[str] | None]) -> Iterator[Prediction]:
        ids = self.tokenizer([LABEL_PREFIX + text for text in texts])["input_ids"]
        ids = [
            row if len(row) <= self.max_input_tokens else [*row[: self.max_input_tokens - 1], row[-1]] for row in ids
        ]
        inputs = t5.Rows(ids, self.model.device)
        if self.task.answer.kind in ("choice", "row_choice"):
            return self._score(inputs, [tuple(own or self.task.answer.labels) for own in choices])
        return self._decode(inputs)

    def _score(self, inputs: t5.Rows, labels: list[tuple[str, ...]]) -> Iterator[Prediction]:
        """Each row's labels by the log-probability of their tokens; one encoder pass, one decoder pass.

        A row's labels stand one after another in one decoder row, each seeing itself alone, so that the row's
        input is attended to once and not once a label.
        """
        device, start = self.model.device, self.model.config.decoder_start_token_id
        unique = list(dict.fromkeys(label for row in labels for label in row))
        ids = dict(zip(unique, self.tokenizer(unique)["input_ids"], strict=True))
        tokens = [[ids[label] for label in row] for row in labels]
        previous = t5.Rows([[i for text in row for i in (start, *text[:-1])] for row in tokens], device)
        targets = torch.tensor([i for row in tokens for text in row for i in text], device=device)
        lengths = torch.tensor([len(text) for row in tokens for text in row], device=device)
        owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)  # the label of each token
        of = previous.grid(owner[:, None]).squeeze(2)
        if len(set(labels)) == 1:
            of = of[:1]  # what may be seen is alike in all rows
        visible = t5.causal(of.shape[1], device) & (of[:, :, None] == of[:, None, :])
        logits = t5.decode(self.model, previous, visible, t5.encode(self.model, inputs), inputs)
        log_probabilities = logits.float().log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
        scores = log_probabilities.new_zeros(len(lengths)).index_add(0, owner, log_probabilities).cpu()
        for row, row_scores in zip(labels, scores.split([len(row) for row in labels]), strict=True):
            probabilities = row_scores.softmax(dim=0)
            best = int(probabilities.argmax())
            yield Prediction(row[best], float(probabilities[best]), row[best])

    def _decode(self, inputs: t5.Rows) -> Iterator[Prediction]:
        """Greedy text; its confidence is the probability of the whole text."""
        padding = self.tokenizer.pad_token_id
        made: Any = self.model.generate(
            input_ids=torch.full_like(inputs.real, padding, dtype=torch.long).masked_scatter(inputs.real, inputs.ids),
            attention_mask=inputs.real.long(),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = self.model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
        written = made.sequences[:, 1:] != padding
        confidence = scores.masked_fill(~written, 0.0).sum(dim=1).exp()
        texts = self.tokenizer.batch_decode(made.sequences, skip_special_tokens=True)
        for text, value in zip(texts, confidence.tolist(), strict=True):
            yield Prediction(self.task.canonical(text), value, text)
