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
from typing import Any, Self

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipelines.errors import UserError
from pipelines.student import IGNORED, LABEL_PREFIX, load_student, pad
from pipelines.tasks import Task

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
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
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
        inputs = pad(ids, self.tokenizer.pad_token_id).to(self.model.device)
        mask = pad([[1] * len(row) for row in ids], 0).to(self.model.device)
        if self.task.answer.kind in ("choice", "row_choice"):
            return self._score(inputs, mask, [list(own or self.task.answer.labels) for own in choices])
        return self._decode(inputs, mask)

    def _score(self, inputs: torch.Tensor, mask: torch.Tensor, labels: list[list[str]]) -> Iterator[Prediction]:
        """Each row's labels by the log-probability of their tokens; one encoder pass, one decoder pass."""
        encoded = self.model.get_encoder()(input_ids=inputs, attention_mask=mask).last_hidden_state
        counts = [len(row) for row in labels]
        owner = torch.repeat_interleave(
            torch.arange(len(labels), device=inputs.device), torch.tensor(counts, device=inputs.device)
        )
        flat = [label for row in labels for label in row]
        unique = list(dict.fromkeys(flat))
        tokens = dict(zip(unique, self.tokenizer(unique)["input_ids"], strict=True))
        targets = pad([tokens[label] for label in flat], IGNORED).to(inputs.device)
        logits = self.model(
            encoder_outputs=(encoded[owner],), attention_mask=mask[owner], labels=targets
        ).logits.float()
        losses = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        scores = -losses.view(targets.shape).sum(dim=1)
        for row, row_scores in zip(labels, torch.split(scores, counts), strict=True):
            probabilities = row_scores.softmax(dim=0)
            best = int(probabilities.argmax())
            yield Prediction(row[best], float(probabilities[best]), row[best])

    def _decode(self, inputs: torch.Tensor, mask: torch.Tensor) -> Iterator[Prediction]:
        """Greedy text; its confidence is the probability of the whole text."""
        made: Any = self.model.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = self.model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
        written = made.sequences[:, 1:] != self.tokenizer.pad_token_id
        confidence = scores.masked_fill(~written, 0.0).sum(dim=1).exp()
        texts = self.tokenizer.batch_decode(made.sequences, skip_special_tokens=True)
        for text, value in zip(texts, confidence.tolist(), strict=True):
            yield Prediction(self.task.canonical(text), value, text)
