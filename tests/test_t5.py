"""T5 over real tokens alone, against each model's own forward over padded rows."""

import itertools
from typing import Any

import pytest
import torch

from pipelines import t5

pytestmark = pytest.mark.slow  # it loads transformers

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
INPUTS = [[7, 8, 9, 10, 1], [11, 1], [12, 13, 14, 15, 16, 17, 18, 1], [1]]
TARGETS = [[20, 1], [21, 22, 23, 24, 1], [1], [25, 26, 1]]


def family(name: str) -> Any:
    """A tiny random model. `t5` is of the first form (relu, scaled), `t5-v1.1` gated and not scaled."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {"feed_forward_proj": "relu"}
    if name == "t5-v1.1":
        settings = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    config = AutoConfig.for_model(name.partition("-")[0], **SIZES, **settings, decoder_start_token_id=0)
    return AutoModelForSeq2SeqLM.from_config(config)


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


@pytest.mark.parametrize("name", ["t5", "t5-v1.1", "mt5", "umt5"])
def test_logits_and_gradients_are_those_of_the_models_own_forward(name: str) -> None:
    model = family(name)
    assert model.config.model_type in t5.FAMILY
    real = padded(TARGETS, -100) >= 0
    own = model(
        input_ids=padded(INPUTS, 0), attention_mask=padded([[1] * len(r) for r in INPUTS], 0), labels=padded(TARGETS, 0)
    ).logits[real]
    own.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    inputs, previous = t5.Rows(INPUTS), t5.Rows([[0, *row[:-1]] for row in TARGETS])
    logits = t5.decode(model, previous, t5.causal(5), t5.encode(model, inputs), inputs)
    logits.square().sum().backward()
    torch.testing.assert_close(logits, own, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].norm()))


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_texts_that_do_not_see_each_other_may_share_a_row(name: str) -> None:
    model = family(name)
    inputs = t5.Rows(INPUTS[:1])
    states = t5.encode(model, inputs)
    texts = [[0, 20, 21], [0], [0, 22]]
    alone = [t5.decode(model, t5.Rows([text]), t5.causal(len(text)), states, inputs) for text in texts]
    of = torch.tensor([[0, 0, 0, 1, 2, 2]])
    visible = t5.causal(6) & (of[:, :, None] == of[:, None, :])
    together = t5.decode(model, t5.Rows([list(itertools.chain(*texts))]), visible, states, inputs)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    model = family("t5")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    inputs = t5.Rows(INPUTS)
    assert torch.equal(t5.encode(model.eval(), inputs), t5.encode(model, inputs))
    assert not torch.equal(t5.encode(model.train(), inputs), t5.encode(model, inputs))


def test_rows_become_a_grid_and_tokens_again() -> None:
    rows = t5.Rows([[5], [6, 7, 8], [9, 10]])
    values = torch.arange(12.0).view(6, 2)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            grid = rows.grid(values)
            assert grid.shape == (3, 3, 2)
            assert grid[1].tolist() == values[1:4].tolist()
            assert torch.equal(rows.tokens(grid), values)
    assert rows.ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert rows.real.sum(dim=1).tolist() == rows.lengths == [1, 3, 2]


@pytest.mark.parametrize("rows", [[[5], [6, 7, 8], [9, 10]], [[5, 6], [7, 8]], [[5], [6]]])
def test_heads_are_split_alike_with_and_without_gradients(rows: list[list[int]]) -> None:
    made = t5.Rows(rows)
    values = torch.randn(len(made.ids), 2 * 3 * 4)
    with torch.no_grad():
        fast = made.split(values, 2, 3)
    for part, other in zip(made.split(values, 2, 3), fast, strict=True):
        assert part.shape == (len(rows), 3, max(map(len, rows)), 4)
        for row, length in enumerate(made.lengths):
            assert torch.equal(part[row, :, :length], other[row, :, :length])


@pytest.mark.parametrize("rows", [0, 1, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_and_their_gradient_are_those_of_a_softmax_over_all_rows(
    rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    logits, weights = 20 * torch.randn(rows, 50).to(dtype), torch.randn(rows)
    tokens = torch.randint(50, (rows,))
    ours, plain = (logits.clone().requires_grad_() for _ in range(2))
    made = t5.log_probabilities(ours, tokens)
    expected = plain.float().log_softmax(dim=1).gather(1, tokens[:, None]).squeeze(1)
    assert torch.allclose(made, expected, rtol=1e-6, atol=1e-5)
    (made * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert plain.grad is not None
    assert ours.grad.dtype == dtype
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
