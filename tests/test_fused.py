"""Fused and packed layers: the numbers of the model's own, for every form of T5."""

import copy

import pytest
import torch
from torch import nn

from pipelines import t5
from pipelines.decoding import write
from pipelines.fused import PackedLinear, fuse, pack
from tests.test_t5 import INPUTS, TARGETS, family

pytestmark = [
    pytest.mark.slow,  # it loads transformers
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["t5", "t5-v1.1", "mt5", "umt5"])
@torch.inference_mode()
def test_logits_and_texts_stay_as_they_are(name: str, packed: bool) -> None:
    plain = family(name).eval()
    fused = copy.deepcopy(plain)
    fuse(fused)
    if packed:
        pack(fused)
    assert any(isinstance(layer, nn.Linear) for layer in fused.modules()) is not packed
    inputs, previous = t5.Rows(INPUTS), t5.Rows([[0, *row[:-1]] for row in TARGETS])
    made, expected = (
        t5.decode(model, previous, t5.causal(5), t5.encode(model, inputs), inputs) for model in (fused, plain)
    )
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    texts, wanted = (write(model, inputs, [0], 1, 20) for model in (fused, plain))
    assert [row.ids for row in texts] == [row.ids for row in wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_packed_layer_is_the_linear_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 40, bias=False, dtype=dtype)
    for shape in ((1, 48), (7, 48), (3, 2, 48)):
        rows = torch.randn(shape, dtype=dtype)
        loose = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(PackedLinear(linear)(rows), linear(rows), rtol=loose, atol=loose)
        after = nn.functional.gelu(linear(rows), approximate="tanh")
        torch.testing.assert_close(PackedLinear(linear, "gelu", "tanh")(rows), after, rtol=loose, atol=loose)
