"""Faster kernels: gelu as one, and fp32 matrix products by oneDNN, in half the time of PyTorch's own on some CPUs.

oneDNN compiles a kernel for every number of rows that it meets, which takes a millisecond or more and is kept for
some hundred of them; so rows are filled up with zeros, to one of sixteen numbers between a power of two and the next.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

_TANH_GELU = "NewGELUActivation"  # transformers' name for it, in eight operations


def fuse_gelu(model: nn.Module) -> None:
    """Put gelu as one operation in the place of transformers' own, in a model of the T5 family."""
    for module in model.modules():
        if type(getattr(module, "act", None)).__name__ == _TANH_GELU:
            module.act = nn.GELU(approximate="tanh")


def use_onednn(model: nn.Module) -> None:
    """Let a model train faster on a CPU in fp32, with the same numbers but for rounding. Parameters stay what and where
    they are."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None and torch.backends.mkldnn.is_available():
            module.__class__ = _Linear


def fill_up(rows: torch.Tensor) -> torch.Tensor:
    """(rows, n) → (as many rows or some more, n)."""
    more = count_missing(len(rows))
    return functional.pad(rows, (0, 0, 0, more)) if more else rows


def count_missing(count: int) -> int:
    """How many rows are to be added to so many."""
    return -count % (1 << max(0, count.bit_length() - 5))


class _Linear(nn.Linear):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, inputs) → (…, outputs)."""
        here = rows.dtype == torch.float32 and rows.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if not here or not rows.numel():
            return super().forward(rows)
        made: torch.Tensor = _Product.apply(rows.reshape(-1, rows.shape[-1]), self.weight)  # type: ignore[no-untyped-call]
        return made.view(*rows.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """(rows, inputs), (outputs, inputs) → (rows, outputs)."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        filled = fill_up(rows)
        ctx.save_for_backward(filled, weight)
        return _product(filled, weight)[: len(rows)]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        filled, weight = ctx.saved_tensors
        count, grad = len(grads[0]), fill_up(grads[0])
        of_rows = _product(grad, weight.t())[:count] if ctx.needs_input_grad[0] else None
        of_weight = _product(grad.t(), filled.t()) if ctx.needs_input_grad[1] else None
        return of_rows, of_weight


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b.T`."""
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return made
