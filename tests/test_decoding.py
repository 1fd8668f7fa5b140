"""Our greedy decoding against each model's own `generate`."""

from collections import Counter
from typing import Any

import pytest
import torch

from pipelines import t5
from pipelines.decoding import Written, write
from tests.test_t5 import INPUTS, family, padded

pytestmark = pytest.mark.slow  # it loads transformers

END = 1
NAMES = ["t5", "t5-v1.1", "mt5", "umt5"]


def written_by_generate(model: Any, inputs: list[list[int]], limit: int, start: list[int], end: int) -> list[Written]:
    made = model.generate(
        input_ids=padded(inputs, 0),
        attention_mask=padded([[1] * len(row) for row in inputs], 0),
        decoder_input_ids=torch.tensor([start] * len(inputs)),
        max_new_tokens=limit,
        do_sample=False,
        use_cache=False,  # its own is made for as many layers as the encoder has
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=end,
        pad_token_id=0,
    )
    logs = torch.stack(made.logits, dim=1).log_softmax(dim=2)
    rows = []
    for ids, row in zip(made.sequences[:, len(start) :].tolist(), logs, strict=True):
        length = ids.index(end) + 1 if end in ids else len(ids)
        rows.append(Written(ids[:length], [float(row[at, token]) for at, token in enumerate(ids[:length])]))
    return rows


def lively(name: str, seed: int) -> Any:
    """A model that repeats itself less: its random weights are larger."""
    model = family(name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model.eval()


def same(made: list[Written], expected: list[Written]) -> None:
    assert [row.ids for row in made] == [row.ids for row in expected]
    for row, other in zip(made, expected, strict=True):
        assert row.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_it_writes_what_generate_writes(name: str) -> None:
    lengths = Counter[int]()
    for seed in range(8):
        model = lively(name, seed)
        inputs = [[2 + (seed * 13 + n * 7 + i * i) % 48 for i in range(1 + n * 3 % 7)] + [END] for n in range(8)]
        for start in ([0], [0, 9, 30]):
            endless = write(model, t5.Rows(inputs), start, -1, 40)
            end = endless[0].ids[2 * seed]  # random weights hardly ever write the tokenizer's
            made = write(model, t5.Rows(inputs), start, end, 40)
            same(made, written_by_generate(model, inputs, 40, start, end))
            lengths.update(len(row.ids) for row in made)
    assert len(lengths) > 3  # rows have left their batches
    assert max(lengths) == 40  # and caches have grown


@torch.inference_mode()
def test_a_row_alone_writes_the_same() -> None:
    model = lively("t5-v1.1", 3)
    together = write(model, t5.Rows(INPUTS), [0], END, 30)
    same(together, [write(model, t5.Rows([row]), [0], END, 30)[0] for row in INPUTS])


@torch.inference_mode()
def test_up_to_the_second_end() -> None:
    counts = Counter[int]()
    for seed in range(8):
        model = lively("t5", seed)
        endless = write(model, t5.Rows(INPUTS), [0], -1, 30)
        end = Counter(token for row in endless for token in row.ids).most_common(1)[0][0]
        made = write(model, t5.Rows(INPUTS), [0], end, 30, ends=2)
        for row, other in zip(made, endless, strict=True):
            places = [at for at, token in enumerate(other.ids) if token == end]
            assert row.ids == other.ids[: places[1] + 1 if len(places) > 1 else None]
            counts[min(2, len(places))] += 1
    assert counts[2]


@torch.inference_mode()
def test_what_is_not_accepted_gives_way_to_the_next_likely() -> None:
    model = lively("t5", 1)
    made = write(model, t5.Rows(INPUTS), [0], END, 12, accepts=lambda ids: ids[-1] % 2 == 0)
    assert all(token % 2 == 0 for row in made for token in row.ids)
    free = write(model, t5.Rows(INPUTS), [0], END, 12)
    for row, other in zip(made, free, strict=True):
        assert row.log_probabilities[0] <= other.log_probabilities[0] + 1e-6
    nothing = write(model, t5.Rows(INPUTS), [0], END, 12, accepts=lambda ids: False)
    assert [row.ids for row in nothing] == [row.ids for row in free]


@torch.inference_mode()
def test_workers_that_are_done_go_on_until_all_are() -> None:
    model, passes = lively("t5", 1), []

    def others(done: bool) -> bool:
        passes.append(done)
        return len(passes) == 20

    inputs = t5.Rows(INPUTS)
    alone = write(model, inputs, [0], END, 8)
    made = write(model, inputs, [0], END, 20, accepts=lambda ids: len(ids) < 5 or ids[-1] == END, all_done=others)
    assert len(passes) == 20
    assert max(len(row.ids) for row in made) <= 5
    assert [row.ids[:4] for row in made] == [row.ids[:4] for row in alone]


@torch.inference_mode()
def test_in_bf16_it_writes_too() -> None:
    model = lively("t5-v1.1", 0).to(torch.bfloat16)
    made = write(model, t5.Rows(INPUTS), [0], END, 20)
    assert all(1 <= len(row.ids) <= 20 for row in made)
    assert all(log <= 0 for row in made for log in row.log_probabilities)
