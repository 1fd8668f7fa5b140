"""T5 over real tokens alone: no linear layer ever sees padding.

Rows lie end to end; only attention lays them out as a padded grid. The numbers are those of the model's own
forward but for float noise, in two thirds of its time. It calls the model's own layers, so what hangs on them
(ZeRO 3, autocast) works as ever. For what Hugging Face calls t5 (v1.1, Flan, ByT5 among them), mt5 and umt5.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

FAMILY = ("t5", "mt5", "umt5")  # values of `config.model_type`


class Rows:
    """Rows of token ids, end to end.

    `ids` is of shape (tokens,), `lengths` the rows' in their order, and `real`, of shape (rows, longest length),
    says where a grid of the rows holds a token.
    """

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> None:
        self.lengths = [len(row) for row in rows]
        real = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]
        self.ids = torch.tensor([i for row in rows for i in row]).to(device)
        self.real = real.to(device)
        self._places = real.flatten().nonzero().squeeze(1).to(device)

    def grid(self, values: torch.Tensor) -> torch.Tensor:
        """(tokens, n) → (rows, longest length, n), zero where there is no token."""
        flat = values.new_zeros(self.real.numel(), values.shape[1])
        return flat.index_copy(0, self._places, values).view(*self.real.shape, -1)

    def tokens(self, grid: torch.Tensor) -> torch.Tensor:
        """(rows, longest length, n) → (tokens, n)."""
        return grid.flatten(0, 1).index_select(0, self._places)


def encode(model: Any, inputs: Rows) -> torch.Tensor:
    """The encoder's states of the inputs' tokens, of shape (tokens, d_model)."""
    return _stack(model.get_encoder(), inputs, inputs.real[:, None])


def decode(
    model: Any,
    previous: Rows,
    visible: torch.Tensor,
    states: torch.Tensor,
    inputs: Rows,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logits of the token after each of `previous`, of shape (tokens, vocabulary).

    Args:
        model: of the T5 family.
        previous: what the decoder has written; each text begins with `config.decoder_start_token_id`. A row may
            hold several texts one after another, since T5 knows only distances between tokens.
        visible: of shape (rows or 1, length, length): which token of a row (second) another (first) may look at.
        states: `encode(model, inputs)`.
        inputs: as many rows as `previous`.
        places: of shape (wanted,); if given, only the logits after these tokens are made.
    """
    written = _stack(model.get_decoder(), previous, visible, states, inputs)
    if places is not None:
        written = written.index_select(0, places)
    if _scaled(model.config):
        written = written * model.config.d_model**-0.5
    logits: torch.Tensor = model.get_output_embeddings()(written)
    return logits


def causal(width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`visible` where each row is one text: a token may look at itself and what is before it."""
    return torch.ones(1, width, width, dtype=torch.bool, device=device).tril()


def apart(rows: Rows, lengths: Sequence[int]) -> torch.Tensor:
    """`visible` where rows hold several texts, of these lengths in tokens: a token may look at what is before it in
    its own text."""
    device = rows.ids.device
    text = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    of = rows.grid(text[:, None]).squeeze(2)
    return causal(of.shape[1], device) & (of[:, :, None] == of[:, None, :])


def _stack(
    stack: Any, rows: Rows, visible: torch.Tensor, states: torch.Tensor | None = None, inputs: Rows | None = None
) -> torch.Tensor:
    hidden: torch.Tensor = stack.dropout(stack.embed_tokens(rows.ids))
    width = rows.real.shape[1]
    for block in stack.block:
        own, *_, feed_forward = block.layer
        if own.SelfAttention.has_relative_attention_bias:  # the first layer's is for all; in umt5 each has its own
            bias = own.SelfAttention.compute_bias(width, width).masked_fill(~visible[:, None], -torch.inf)
        normed = own.layer_norm(hidden)
        hidden = hidden + own.dropout(_attend(own.SelfAttention, normed, rows, normed, rows, bias))
        if states is not None and inputs is not None:
            cross = block.layer[1]
            real = hidden.new_zeros(inputs.real.shape).masked_fill(~inputs.real, -torch.inf)
            normed = cross.layer_norm(hidden)
            read = _attend(cross.EncDecAttention, normed, rows, states, inputs, real[:, None, None])
            hidden = hidden + cross.dropout(read)
        hidden = feed_forward(hidden)
    finished: torch.Tensor = stack.dropout(stack.final_layer_norm(hidden))
    return finished


def _attend(
    attention: Any, hidden: torch.Tensor, rows: Rows, states: torch.Tensor, seen: Rows, bias: torch.Tensor
) -> torch.Tensor:
    """Attention from the tokens of `rows` to those of `seen`, row by row; T5 does not scale its scores.

    Written out, since the fused one is slower wherever a gradient of the bias is wanted.
    """

    def heads(projected: torch.Tensor, of: Rows) -> torch.Tensor:
        split: torch.Tensor = of.grid(projected).unflatten(2, (attention.n_heads, -1))
        return split.transpose(1, 2)

    scores = heads(attention.q(hidden), rows) @ heads(attention.k(states), seen).transpose(2, 3) + bias
    weights = functional.dropout(scores.softmax(dim=3), attention.dropout, attention.training)
    read = weights @ heads(attention.v(states), seen)
    projected: torch.Tensor = attention.o(rows.tokens(read.transpose(1, 2).flatten(2)))
    return projected


def _scaled(config: Any) -> bool:
    """Whether states are scaled before they meet the vocabulary; each family has its own rule."""
    if config.model_type == "t5":
        return bool(config.scale_decoder_outputs)
    return bool(config.model_type == "umt5" and config.tie_word_embeddings)
