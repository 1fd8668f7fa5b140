"""Faster layers in the place of a T5's own, with the same numbers but for rounding, where nothing is trained.

Keys, queries and values of a layer come from one product; norms and gelu are one operation each. On a CPU, weights lie
as oneDNN's kernels want them, which in fp32 takes less than half the time of PyTorch's own product.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipelines.onednn import fill_up, fuse_gelu


class PackedLinear(nn.Module):
    """A linear layer without bias and what follows it, with weights in oneDNN's order; inference on CPUs alone."""

    weight = None  # what T5 asks for the type of, before it converts to that

    def __init__(self, linear: nn.Linear, activation: str = "none", variant: str = "") -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._activation, self._variant = activation, variant

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, inputs) → (rows, outputs)."""
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            fill_up(rows), self._packed, None, self._activation, [], self._variant
        )
        return made[: len(rows)]


class _Norm(nn.Module):
    """T5's norm in one operation less."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(rows, (rows.shape[-1],), self.weight, self.epsilon)


class _Direction(nn.Module):
    """The same up to a factor for each input, which the weights of the layers that follow have taken over."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self._least = float(norm.variance_epsilon * len(norm.weight)) ** 0.5

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.normalize(rows, dim=-1, eps=self._least)


class _FeedForward(nn.Module):
    """What stands in a block after attention, in fewer calls."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        dense = layer.DenseReluDense
        self.gate = dense.wi_1 if hasattr(dense, "wi_1") else None
        self.wi, self.act, self.wo = dense.wi_0 if self.gate else dense.wi, dense.act, dense.wo
        self.norm = _fold(layer.layer_norm, self.wi, *([self.gate] if self.gate else []))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = self.norm(hidden)
        inner = self.act(self.wi(rows))
        made: torch.Tensor = hidden + self.wo(inner if self.gate is None else inner * self.gate(rows))
        return made


def fuse(model: Any) -> None:
    """Join what `t5` calls together. The model can't be trained or saved afterwards, and has no other forward."""
    fuse_gelu(model)
    for stack in (model.get_encoder(), model.get_decoder()):
        for block in stack.block:
            own, *cross, feed_forward = block.layer
            attention = own.SelfAttention
            own.layer_norm = _fold(own.layer_norm, attention.q, attention.k, attention.v)
            _join(attention, "qkv")
            for layer in cross:
                layer.layer_norm = _fold(layer.layer_norm, layer.EncDecAttention.q)
                _join(layer.EncDecAttention, "kv")
            block.layer[-1] = _FeedForward(feed_forward)
        stack.final_layer_norm = _Norm(stack.final_layer_norm)


@torch.no_grad()
def _fold(norm: Any, *followers: nn.Linear) -> _Direction:
    """A norm without its factors, which go into the layers that follow it."""
    for linear in followers:
        linear.weight.mul_(norm.weight * len(norm.weight) ** 0.5)
    return _Direction(norm)


def pack(module: nn.Module) -> None:
    """Put packed layers in the place of all linear ones without bias, in what `fuse` has made."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and child.bias is None:
            setattr(module, name, PackedLinear(child))
            continue
        fits = isinstance(child, _FeedForward) and isinstance(child.act, nn.GELU | nn.ReLU)
        if fits and isinstance(child.wi, nn.Linear):
            follows = ("gelu", "tanh") if isinstance(child.act, nn.GELU) else ("relu", "")
            child.wi, child.act = PackedLinear(child.wi, *follows), nn.Identity()
        pack(child)


def _join(attention: Any, names: str) -> None:
    """One layer in the place of some, their outputs side by side."""
    weight = torch.cat([getattr(attention, name).weight.detach() for name in names])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    for name in names:
        delattr(attention, name)
    setattr(attention, names, joined)
