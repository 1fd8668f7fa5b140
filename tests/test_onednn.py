"""Products by oneDNN: the numbers and gradients of PyTorch's own."""

import copy

import pytest
import torch
from torch import nn

from pipelines.onednn import fill_up, use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.mark.parametrize("count", [0, 1, 7, 33, 100, 1025])
def test_numbers_and_gradients_are_those_of_the_linear_layer(count: int) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 40, bias=False)
    fast = copy.deepcopy(plain)
    use_onednn(fast)
    inputs = torch.randn(count, 48)
    made = []
    for layer in (plain, fast):
        rows = inputs.clone().requires_grad_()
        outputs = layer(rows)
        (outputs.square().sum() + outputs.sum()).backward()
        made.append((outputs, rows.grad, layer.weight.grad))
    for own, expected in zip(made[1], made[0], strict=True):
        torch.testing.assert_close(
            own, expected, rtol=1e-5, atol=1e-6 * max(1.0, float(expected.norm()) if expected.numel() else 0.0)
        )


def test_a_gradient_may_be_laid_out_in_any_way() -> None:
    layer = nn.Linear(48, 40, bias=False)
    use_onednn(layer)
    rows = torch.randn(33, 48, requires_grad=True)
    layer(rows).sum().backward()  # one number, shown as (33, 40)
    torch.testing.assert_close(rows.grad, layer.weight.sum(dim=0).expand(33, 48), rtol=1e-5, atol=1e-5)
    transposed = torch.randn(48, 33).t()
    torch.testing.assert_close(layer(transposed), transposed @ layer.weight.t(), rtol=1e-5, atol=1e-5)


def test_rows_may_lie_in_a_grid() -> None:
    layer = nn.Linear(48, 40, bias=False)
    use_onednn(layer)
    grid = torch.randn(2, 3, 48)
    assert layer(grid).shape == (2, 3, 40)
    torch.testing.assert_close(layer(grid)[1], layer(grid[1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(grid[0, 0]), layer(grid[0])[0], rtol=1e-5, atol=1e-5)


def test_what_needs_no_gradient_gets_none() -> None:
    layer = nn.Linear(8, 4, bias=False)
    use_onednn(layer)
    layer.weight.requires_grad_(False)
    rows = torch.randn(3, 8, requires_grad=True)
    layer(rows).sum().backward()
    assert layer.weight.grad is None
    assert rows.grad is not None
    with torch.no_grad():
        assert not layer(rows).requires_grad


def test_under_autocast_products_stay_in_bf16() -> None:
    layer = nn.Linear(8, 4, bias=False)
    use_onednn(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16


def test_parameters_stay_what_they_are() -> None:
    model = nn.ModuleDict({"no_bias": nn.Linear(8, 4, bias=False), "bias": nn.Linear(4, 2)})
    before = dict(model.named_parameters())
    use_onednn(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert type(model["bias"]) is nn.Linear


def test_rows_are_filled_up_to_few_numbers() -> None:
    made = {len(fill_up(torch.ones(count, 2))) for count in range(1024, 2049)}
    assert len(made) == 17
    for count in (1, 31, 1025):
        filled = fill_up(torch.ones(count, 2))
        assert len(filled) <= count * 17 / 16
        assert filled.sum() == 2 * count
