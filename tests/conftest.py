"""A small run that every stage's tests can start from."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.lineage import Lineage
from pipelines.recipe import load_recipe

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there; the models are tiny, and threads would only wait

Row = dict[str, Any]
TASK = {
    "name": "mood",
    "input": "{text}",
    "answer": {"kind": "choice", "labels": ["good", "bad"]},
    "exemplars": [{"input": {"text": "Fine day."}, "rationale": "A fine day is good.", "label": "good"}],
}
ROWS = {
    "train": [{"text": f"train {n}", "label": ("good", "bad")[n % 2]} for n in range(8)],
    "validation": [{"text": f"validation {n}", "label": "bad"} for n in range(3)],
    "test": [{"text": f"test {n}", "label": "good"} for n in range(3)],
    "unlabelled": [{"text": f"unlabelled {n}"} for n in range(4)],
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules that are deselected as a whole are not even imported: that is most of what they cost."""
    if collection_path.suffix == ".py":
        text = collection_path.read_text(encoding="utf-8")
        for mark in ("ray", "slow"):
            if f"not {mark}" in config.option.markexpr and f"\npytestmark = pytest.mark.{mark}" in text:
                return True
    return None


@pytest.fixture
def make_line(tmp_path: Path) -> Callable[..., Lineage]:
    """`make_line("student.alpha=0.1", rows={...}, task={...})`: a run with files of its own, where `rows` are the
    splits that it has, `task` changes keys of the task and `texts` are the teacher's outputs of splits."""

    def make(
        *overrides: str,
        rows: dict[str, list[Row]] = ROWS,
        task: Row | None = None,
        texts: dict[str, list[Row]] | None = None,
    ) -> Lineage:
        for folder in ("teacher", "student"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "config.json").write_text(json.dumps({"model": folder}))
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK | (task or {})))
        for name, content in [*rows.items(), *((f"{split}-texts", t) for split, t in (texts or {}).items())]:
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        teacher: Row = {"model": str(tmp_path / "teacher")}
        if texts:
            teacher = {"engine": "outputs", "outputs": {split: f"{split}-texts.jsonl" for split in texts}}
        recipe = {
            "name": "small",
            "storage": str(tmp_path / "runs"),
            "task": str(tmp_path / "task.yaml"),
            "source": {"root": str(tmp_path), **{split: f"{split}.jsonl" for split in rows}},
            "teacher": teacher,
            "student": {"model": str(tmp_path / "student")},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return Lineage(load_recipe(str(tmp_path / "recipe.yaml"), overrides))

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; without one, the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the path")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`make_bundle("returns", "1", "returns_desk", seed=0)`: its folder. Other seeds answer differently."""
    import torch  # heavy: only for tests that serve

    from pipelines.bundle import Bundle
    from pipelines.checksums import write_checksums
    from pipelines.predictor import Predictor
    from pipelines.recipe import resolve
    from pipelines.student import load_student
    from pipelines.tasks import load_task

    def make(name: str, version: str, task: str = "returns_desk", seed: int = 0) -> str:
        folder = Path(tmp_path_factory.mktemp("bundle"))
        model, tokenizer = load_student(resolve("builtin:quickstart/student"))
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * weight.std() * 0.3)
        bundle = Bundle(name, version, temperature=1.5, abstain_below=0.95)  # surer than it is of some
        Predictor(model, tokenizer, load_task(task), 256, 8, bundle=bundle).save(folder)
        write_checksums(folder)
        return str(folder)

    return make
