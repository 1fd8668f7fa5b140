"""T5 over real tokens alone: no linear layer ever sees padding.

Rows lie end to end; only attention lays them out as a padded grid. The numbers are those of the model's own
forward but for float noise, in two thirds of its time. It calls the model's own layers, so what hangs on them
(ZeRO 3, autocast) works as ever. For what Hugging Face calls t5 (v1.1, Flan, ByT5 among them), mt5 and umt5.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from pipelines.onednn import count_missing

FAMILY = ("t5", "mt5", "umt5")  # values of `config.model_type`
_AT_ONCE = 16  # rows of the vocabulary


class Rows:
    """Rows of token ids, end to end.

    `ids` is of shape (tokens,), `lengths` the rows' in their order, and `real`, of shape (rows, longest length),
    says where a grid of the rows holds a token; `padded`, whether there are places where it does not. With `filled`,
    some tokens follow that no grid has, so that fast layers need not fill up what they get; not for training.
    """

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", filled: bool = False) -> None:
        self.lengths = [len(row) for row in rows]
        real = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]
        ids = [i for row in rows for i in row]
        more = count_missing(len(ids)) if filled else 0
        self.ids = torch.tensor(ids + [0] * more).to(device)
        self.real = real.to(device)
        self.padded = min(self.lengths) < max(self.lengths) or more > 0
        places = real.flatten()
        self._places = functional.pad(places.nonzero().squeeze(1), (0, more)).to(device)
        self._token_at = (places.cumsum(0) - 1).clamp_(min=0).to(device)  # where there is none, the one before
        self._orders: dict[tuple[int, int], torch.Tensor] = {}

    def grid(self, values: torch.Tensor) -> torch.Tensor:
        """(tokens, n) → (rows, longest length, n); what stands where there is no token means nothing."""
        if not self.padded:
            return values.view(*self.real.shape, -1)
        if torch.is_grad_enabled():  # going back, a copy is faster
            flat = values.new_zeros(self.real.numel(), values.shape[1]).index_copy(0, self._places, values)
        else:
            flat = values.index_select(0, self._token_at)
        return flat.view(*self.real.shape, -1)

    def tokens(self, grid: torch.Tensor) -> torch.Tensor:
        """(rows, longest length, n) → (tokens, n)."""
        flat = grid.flatten(0, 1)
        return flat.index_select(0, self._places) if self.padded else flat

    def split(self, values: torch.Tensor, parts: int, heads: int) -> tuple[torch.Tensor, ...]:
        """(tokens, parts * heads * n) → as many parts of shape (rows, heads, longest length, n), as a grid each."""
        if torch.is_grad_enabled() or len(self.ids) == len(self.lengths):
            grid = self.grid(values)
            return grid.view(*grid.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if (parts, heads) not in self._orders:  # one copy, from which products need no other
            at = self._token_at.view(self.real.shape)[None, :, None] * (parts * heads)
            head = torch.arange(parts * heads, device=at.device).view(parts, 1, heads, 1)
            self._orders[parts, heads] = (at + head).flatten()
        flat = values.view(len(self.ids) * parts * heads, -1).index_select(0, self._orders[parts, heads])
        return flat.view(parts, len(self.lengths), heads, self.real.shape[1], -1).unbind(0)


def embed(model: Any, *rows: Rows) -> tuple[torch.Tensor, ...]:
    """The embeddings of tokens, of shape (tokens, d_model), of each of `rows`. They are looked up at once, since the
    gradient of each look-up is as large as the vocabulary."""
    looked_up: torch.Tensor = model.get_input_embeddings()(torch.cat([some.ids for some in rows]))
    split: tuple[torch.Tensor, ...] = looked_up.split([len(some.ids) for some in rows])
    return split


def encode(model: Any, inputs: Rows, embedded: torch.Tensor | None = None) -> torch.Tensor:
    """The encoder's states of the inputs' tokens, of shape (tokens, d_model); `embedded` as `embed` makes it."""
    return _stack(model.get_encoder(), inputs, inputs.real[:, None], embedded)


def decode(
    model: Any,
    previous: Rows,
    visible: torch.Tensor,
    states: torch.Tensor,
    inputs: Rows,
    places: torch.Tensor | None = None,
    embedded: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
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
        embedded: `previous` as `embed` makes it, if that is done.
        tokens: of shape (n,); if given, only the logits of these tokens of the vocabulary are made.
    """
    written = _stack(model.get_decoder(), previous, visible, embedded, states, inputs)
    if places is not None:
        written = written.index_select(0, places)
    return logits(model, written, tokens)


def logits(model: Any, states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """The decoder's states against the vocabulary, of shape (tokens, vocabulary), or against some `tokens` of it."""
    if _scaled(model.config):
        states = states * model.config.d_model**-0.5
    head = model.get_output_embeddings()
    if tokens is not None and head.weight is not None and head.weight.dim() == 2:  # ZeRO 3 leaves none outside a layer
        return functional.linear(states, head.weight[tokens])
    made: torch.Tensor = head(states)
    return made if tokens is None else made[:, tokens]


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of one token of the vocabulary a row, of shape (rows,), in fp32."""
    made: torch.Tensor = _LogProbabilities.apply(logits, tokens)  # type: ignore[no-untyped-call]
    return made


class _LogProbabilities(torch.autograd.Function):
    """A few rows at a time: they stay in a processor's cache, and nothing in fp32 is as large as the logits. Going
    back, probabilities are made again rather than kept."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, tokens)
        pairs = zip(_parts(logits), _parts(tokens[:, None]), strict=True)
        return torch.cat([rows.float().log_softmax(dim=1).gather(1, token) for rows, token in pairs]).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, tokens = ctx.saved_tensors
        made = torch.empty_like(logits)
        for rows, to, token, grad in zip(*map(_parts, (logits, made, tokens[:, None], grads[0][:, None])), strict=True):
            to.copy_(rows.float().softmax(dim=1).mul_(-grad).scatter_add_(1, token, grad))
        return made, None


def _parts(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = rows.split(_AT_ONCE if rows.device.type == "cpu" else max(1, len(rows)))
    return parts


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
    stack: Any,
    rows: Rows,
    visible: torch.Tensor,
    embedded: torch.Tensor | None,
    states: torch.Tensor | None = None,
    inputs: Rows | None = None,
) -> torch.Tensor:
    hidden: torch.Tensor = stack.dropout(stack.embed_tokens(rows.ids) if embedded is None else embedded)
    width = rows.real.shape[1]
    real = None if inputs is None else only_real(inputs, hidden.dtype)
    for block in stack.block:
        own, *_, feed_forward = block.layer
        if own.SelfAttention.has_relative_attention_bias:  # the first layer's is for all; in umt5 each has its own
            bias = own.SelfAttention.compute_bias(width, width).masked_fill(~visible[:, None], -torch.inf)
        asking, *seen = projections(own.SelfAttention, _cast_for_autocast(own.layer_norm(hidden)), rows)
        hidden = hidden + own.dropout(attend(own.SelfAttention, asking, seen, bias, rows))
        if states is not None and inputs is not None:
            cross = block.layer[1]
            attention = cross.EncDecAttention
            asking = queries(attention, cross.layer_norm(hidden), rows)
            read = keys_and_values(attention, states, inputs)
            hidden = hidden + cross.dropout(attend(attention, asking, read, real, rows))
        hidden = feed_forward(hidden)
    finished: torch.Tensor = stack.dropout(stack.final_layer_norm(hidden))
    return finished


def _cast_for_autocast(hidden: torch.Tensor) -> torch.Tensor:
    """In autocast's dtype, where that is on, so that not each of several products casts it for itself."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def only_real(inputs: Rows, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to attention scores so that no padding is seen, of shape (rows, 1, 1, longest length)."""
    if not inputs.padded:
        return None
    zeros = torch.zeros(inputs.real.shape, dtype=dtype, device=inputs.real.device)
    return zeros.masked_fill(~inputs.real, -torch.inf)[:, None, None]


def attend(
    attention: Any, asking: torch.Tensor, seen: Sequence[torch.Tensor], bias: torch.Tensor | None, rows: Rows
) -> torch.Tensor:
    """What the tokens of `rows` get from attention with these queries to these keys and values, of shape (tokens,
    d_model); T5 does not scale its scores.

    Written out, since PyTorch's own is slower here, with and without a gradient.
    """
    keys, values = seen
    scores = asking @ keys.transpose(2, 3)
    weights = (scores if bias is None else scores + bias).softmax(dim=3)
    read = functional.dropout(weights, attention.dropout, attention.training) @ values
    made: torch.Tensor = attention.o(rows.tokens(read.transpose(1, 2).flatten(2)))
    return made


# What attention works with, of shape (rows, heads, longest length, n) each. `fused` has joined some of its layers.


def projections(attention: Any, hidden: torch.Tensor, of: Rows) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of the same tokens."""
    if hasattr(attention, "qkv"):
        return of.split(attention.qkv(hidden), 3, attention.n_heads)
    return queries(attention, hidden, of), *keys_and_values(attention, hidden, of)


def queries(attention: Any, hidden: torch.Tensor, of: Rows) -> torch.Tensor:
    return of.split(attention.q(hidden), 1, attention.n_heads)[0]


def keys_and_values(attention: Any, states: torch.Tensor, of: Rows) -> tuple[torch.Tensor, ...]:
    if hasattr(attention, "kv"):
        return of.split(attention.kv(states), 2, attention.n_heads)
    keys, values = attention.k(states), attention.v(states)
    return of.split(keys, 1, attention.n_heads)[0], of.split(values, 1, attention.n_heads)[0]


def _scaled(config: Any) -> bool:
    """Whether states are scaled before they meet the vocabulary; each family has its own rule."""
    if config.model_type == "t5":
        return bool(config.scale_decoder_outputs)
    return bool(config.model_type == "umt5" and config.tie_word_embeddings)
