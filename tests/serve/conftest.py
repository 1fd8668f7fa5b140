"""Bundles to serve, made on the spot from the quickstart's student base."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.checksums import write_checksums
from pipelines.predictor import Bundle, Predictor
from pipelines.recipe import resolve
from pipelines.student import load_student
from pipelines.tasks import load_task

MakeBundle = Callable[..., str]


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """`make_bundle("returns", "1", "returns_desk", seed=0)`: its folder. Other seeds answer differently."""

    def make(name: str, version: str, task: str = "returns_desk", seed: int = 0) -> str:
        folder = Path(tmp_path_factory.mktemp("bundle"))
        model, tokenizer = load_student(resolve("builtin:quickstart/student"))
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * weight.std() * 0.3)
        bundle = Bundle(name, version, temperature=1.5, abstain_below=0.5)
        Predictor(model, tokenizer, load_task(task), 256, 8, bundle=bundle).save(folder)
        write_checksums(folder)
        return str(folder)

    return make
