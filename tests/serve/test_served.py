"""A bundle as a replica has it, without a replica: what waits is answered together."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serve.meter import Meter
from serve.served import Served
from serve.settings import Settings

pytestmark = pytest.mark.slow  # it loads transformers


class Noted(Meter):
    """Which batches went through the model, by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def batch(self, model: str, version: str, rows: int, tokens: int, milliseconds: float) -> None:
        self.sizes.append(rows)


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., str]) -> str:
    return make_bundle("returns", "1")


@pytest.fixture
def served(bundle: str) -> tuple[Served, Noted]:
    meter = Noted()
    settings = Settings(bundles=(bundle,), batch_tokens=256)
    return Served.open(bundle, settings, meter, ThreadPoolExecutor(1)), meter


def test_what_waits_goes_through_the_model_together_as_far_as_a_batch_holds_it(served: tuple[Served, Noted]) -> None:
    model, meter = served

    async def ask_together(text: str) -> None:
        await asyncio.gather(*(model.answer([text], [None], False) for _ in range(20)))

    asyncio.run(ask_together("a"))
    assert meter.sizes == [20]
    asyncio.run(ask_together("a message of many words " * 8))
    assert sum(meter.sizes) == 40
    assert len(meter.sizes) > 3


def test_requests_that_were_given_up_are_not_answered(served: tuple[Served, Noted]) -> None:
    model, meter = served

    async def give_up_some() -> list[Any]:
        asked = [asyncio.ensure_future(model.answer([f"message {n}"], [None], False)) for n in range(6)]
        await asyncio.sleep(0)  # all wait now
        for request in asked[1:4]:
            request.cancel()
        return await asyncio.gather(*asked, return_exceptions=True)

    made = asyncio.run(give_up_some())
    assert [isinstance(answer, asyncio.CancelledError) for answer in made] == [False, True, True, True, False, False]
    assert sum(meter.sizes) == 3


def test_a_batch_that_fails_takes_no_other_with_it(
    served: tuple[Served, Noted], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = served
    predict = model._predictor.predict_ids

    def fail_once(*given: Any, **more: Any) -> Any:
        monkeypatch.setattr(model._predictor, "predict_ids", predict)
        raise RuntimeError("no memory")

    monkeypatch.setattr(model._predictor, "predict_ids", fail_once)

    async def one_after_the_other() -> list[Any]:
        first = asyncio.ensure_future(model.answer(["a"], [None], False))
        await asyncio.sleep(0.01)
        return list(await asyncio.gather(first, model.answer(["b"], [None], False), return_exceptions=True))

    failed, answered = asyncio.run(one_after_the_other())
    assert isinstance(failed, RuntimeError)
    assert answered[0].label
