"""Linear layers in int8, with oneDNN's kernels, for processors that have no matrix products in bf16.

Weights are scaled by output, activations by row, so that a row's answer does not depend on what shares its batch.
Activations have 7 bits: with 8, sums of two products overflow on processors without VNNI.
"""

import torch
from torch import nn

_RANGE, _ZERO = 63, 64  # activations go from 1 to 127
_LEAST = 1e-12  # a row of zeros stays one


class Int8Linear(nn.Module):
    """A linear layer without bias, whose weights are rounded to 8 bits."""

    weight = None  # what T5 asks for the type of, where it has floats

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self._scales = weight.abs().amax(dim=1).clamp(min=_LEAST) / 127
        self._zeros = torch.zeros(len(weight), dtype=torch.long)
        rounded = (weight / self._scales[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, inputs) → (…, outputs), in fp32."""
        largest = rows.abs().amax(dim=-1, keepdim=True).clamp(min=_LEAST)
        rounded = (rows * (_RANGE / largest) + (_ZERO + 0.5)).to(torch.uint8)
        scale = 1 / _RANGE
        weights = (self._packed, self._scales, self._zeros)
        made: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded, scale, _ZERO, *weights, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return made.mul_(largest)


def quantize(module: nn.Module) -> None:
    """Put int8 layers in the place of all linear ones without bias. It can't be trained or saved afterwards."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and child.bias is None:
            setattr(module, name, Int8Linear(child))
        else:
            quantize(child)
