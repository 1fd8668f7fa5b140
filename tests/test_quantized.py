"""Int8 layers: close to what they stand for, and the same whatever shares the batch."""

import pytest
import torch
from torch import nn

from pipelines.predictor import can_run
from pipelines.quantized import Int8Linear, quantize

pytestmark = pytest.mark.slow  # it imports torch
if not can_run("int8"):
    pytest.skip("this processor has no int8 products", allow_module_level=True)


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(256, 128, bias=False)


def test_products_are_close(linear: nn.Linear) -> None:
    rows = torch.randn(50, 256) * torch.logspace(-3, 3, 50)[:, None]  # each row has its own scale
    with torch.inference_mode():
        exact, made = linear(rows), Int8Linear(linear)(rows)
    apart = (exact - made).norm(dim=1) / exact.norm(dim=1)
    assert float(apart.max()) < 0.05


def test_a_row_does_not_depend_on_its_batch(linear: nn.Linear) -> None:
    layer, rows = Int8Linear(linear), torch.randn(40, 256)
    rows[7] *= 1000
    whole = layer(rows)
    for at in (0, 7, 39):
        assert torch.equal(layer(rows[at : at + 1]), whole[at : at + 1])


def test_zeros_stay_zeros(linear: nn.Linear) -> None:
    assert torch.equal(Int8Linear(linear)(torch.zeros(3, 256)), torch.zeros(3, 128))


def test_only_linear_layers_without_bias_are_replaced() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Sequential(nn.Linear(8, 8), nn.Embedding(4, 8)))
    quantize(model)
    assert [type(m).__name__ for m in model.modules()] == [
        "Sequential",
        "Int8Linear",
        "Sequential",
        "Linear",
        "Embedding",
    ]
