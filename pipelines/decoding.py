"""Greedy decoding: what a student of the T5 family writes by itself, token by token.

Like `t5`, on which it stands, it calls the model's own layers. The encoder runs once, over real tokens, and what the
decoder reads of its states (each layer's keys and values) is made once; a pass then has one token of each row, and rows
that have ended leave the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from pipelines import t5

_TRIED = 256  # the likeliest tokens, of which a row gets the first that is accepted
_ROOM = 16  # tokens of a row that a cache has room for at first
_WORTH = 0.75  # with more of its rows open, a batch is not made smaller: what is kept must be copied


class Written(NamedTuple):
    """What was written of one row, its ends of sequence included, and the log-probability of each token."""

    ids: list[int]
    log_probabilities: list[float]


def write(
    model: Any,
    inputs: t5.Rows,
    start: Sequence[int],
    end: int,
    max_new_tokens: int,
    ends: int = 1,
    accepts: Callable[[list[int]], bool] | None = None,
    all_done: Callable[[bool], bool] = bool,
) -> list[Written]:
    """The likeliest token after each, as Hugging Face's greedy `generate` takes it.

    Args:
        model: of the T5 family, in evaluation mode.
        inputs: what the encoder reads.
        start: what the decoder is given, `config.decoder_start_token_id` first.
        end: the end of sequence.
        max_new_tokens: of a row, at most.
        ends: a row is done after so many ends of sequence.
        accepts: whether a row may be this; if not, it gets the likeliest token with which it may.
        all_done: told after each pass whether all rows here are done, says whether to stop. Where several workers must
            run the same number of passes, it asks the others.
    """
    written = [Written([], []) for _ in inputs.lengths]
    cache = _Cache(model, inputs)
    for given in start[:-1]:
        cache.read([given] * len(written))
    open_rows = list(range(len(written)))  # those in the batch
    tokens = [start[-1]] * len(written)
    for _ in range(max_new_tokens):
        tokens, logs = _choose(cache.read(tokens), [written[row].ids for row in open_rows], accepts)
        going = []
        for place, row in enumerate(open_rows):
            if written[row].ids.count(end) < ends:
                written[row].ids.append(tokens[place])
                written[row].log_probabilities.append(logs[place])
                if written[row].ids.count(end) < ends:
                    going.append(place)
        if all_done(not going):
            break
        if 0 < len(going) <= _WORTH * len(open_rows):
            cache.keep(going)
            open_rows, tokens = [open_rows[place] for place in going], [tokens[place] for place in going]
    return written


def _choose(
    logits: torch.Tensor, written: list[list[int]], accepts: Callable[[list[int]], bool] | None
) -> tuple[list[int], list[float]]:
    """Each row's next token and its log-probability."""
    chosen = logits.argmax(dim=1)
    if accepts is not None:
        for row, token in enumerate(chosen.tolist()):
            if not accepts([*written[row], token]):
                likeliest = logits[row].topk(min(_TRIED, logits.shape[1])).indices.tolist()
                chosen[row] = next((other for other in likeliest if accepts([*written[row], other])), token)
    logs = t5.log_probabilities(logits, chosen)
    return chosen.tolist(), logs.tolist()


class _Cache:
    """The decoder between two passes: keys and values of what it reads and, growing, of what it has written."""

    def __init__(self, model: Any, inputs: t5.Rows) -> None:
        self.model, self.stack = model, model.get_decoder()
        states = t5.encode(model, inputs)
        cross = [block.layer[1].EncDecAttention for block in self.stack.block]
        self.inputs = [
            tuple(made.contiguous() for made in t5.keys_and_values(attention, states, inputs)) for attention in cross
        ]
        self.only_real = t5.only_real(inputs, states.dtype)
        self.written: list[list[torch.Tensor]] = []
        self.length = self.room = 0  # of a row, in tokens

    def read(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits after one more token of each row, of shape (rows, vocabulary)."""
        rows = t5.Rows([[token] for token in tokens], self.model.device)
        hidden = self.stack.embed_tokens(rows.ids)
        if self.length == self.room:
            self._grow(hidden)
        self.length += 1
        for block, bias, written, inputs in zip(self.stack.block, self.biases, self.written, self.inputs, strict=True):
            own, cross, feed_forward = block.layer
            asking, *new = t5.projections(own.SelfAttention, own.layer_norm(hidden), rows)
            for kept, value in zip(written, new, strict=True):
                kept[:, :, self.length - 1 : self.length] = value
            seen = [kept[:, :, : self.length] for kept in written]
            hidden = hidden + t5.attend(own.SelfAttention, asking, seen, bias[..., -self.length :], rows)
            asking = t5.queries(cross.EncDecAttention, cross.layer_norm(hidden), rows)
            hidden = hidden + t5.attend(cross.EncDecAttention, asking, inputs, self.only_real, rows)
            hidden = feed_forward(hidden)
        return t5.logits(self.model, self.stack.final_layer_norm(hidden))

    def keep(self, places: list[int]) -> None:
        """Go on with these rows alone."""
        at = torch.tensor(places, device=self.model.device)
        self.inputs = [tuple(kept[at] for kept in layer) for layer in self.inputs]
        self.written = [[kept[at] for kept in layer] for layer in self.written]
        if self.only_real is not None:
            self.only_real = self.only_real[at]

    def _grow(self, hidden: torch.Tensor) -> None:
        """Make room for as many tokens again. Biases are by distance, the token itself last."""
        more = max(self.room, _ROOM)
        self.room += more
        if not self.written:
            self.written = [
                [hidden.new_zeros(*kept.shape[:2], 0, kept.shape[3]) for kept in layer] for layer in self.inputs
            ]
        self.written = [[functional.pad(kept, (0, 0, 0, more)) for kept in layer] for layer in self.written]
        self.biases: list[torch.Tensor] = []
        for block in self.stack.block:
            attention = block.layer[0].SelfAttention
            if attention.has_relative_attention_bias:
                bias = attention.compute_bias(1, self.room, past_seen_tokens=self.room - 1)
            self.biases.append(bias)
