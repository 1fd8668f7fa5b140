"""One local Ray for the whole tier, stopped at its end; and a small recipe that is done up to its dataset."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.lineage import Lineage
from pipelines.ray_session import ray_session
from pipelines.recipe import load_recipe
from tests.engines.processes import is_agent

LABELS = ("bad", "good")
DAYS = [{"day": f"Day {n} was {('grim', 'fine')[n % 2]}.", "label": LABELS[n % 2]} for n in range(32)]
RECIPE = {
    "name": "days",
    "teacher": {"engine": "outputs", "outputs": {"train": "texts.jsonl"}},
    "student": {
        "learning_rate": 1e-3,
        "batch_size": 8,
        "steps": 20,
        "eval_every": 20,
        "dropout": 0.0,
        "precision": "fp32",
    },
    "runs": [{"arm": "step_by_step"}],
}


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[None]:
    with ray_session():
        yield


class Place:
    """A copy of the recipe `days`, to train in. It says of 32 days whether they were good; 28 have a rationale."""

    days = DAYS

    def __init__(self, made: Path, folder: Path) -> None:
        shutil.copytree(made / "runs", folder / "runs")
        self.recipe, self.storage, self.log = str(made / "recipe.yaml"), folder / "runs", folder / "log"

    def line(self, *overrides: str) -> Lineage:
        return Lineage(load_recipe(self.recipe, [f"storage={self.storage}", *overrides]))

    def start(self, command: str, *overrides: str) -> subprocess.Popen[bytes]:
        """A command as a process of its own, on a Ray cluster of its own; what it says goes into `log`."""
        sets = [part for override in (f"storage={self.storage}", *overrides) for part in ("--set", override)]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pipelines", command, self.recipe, *sets],
                stdout=log,
                stderr=log,
                env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            )

    def end(self, process: subprocess.Popen[bytes], family: list[psutil.Process]) -> list[str]:
        """When a process is over: the names of those of its family that outlive it by half a minute, which end now;
        of Ray's agents it is known that they do."""
        process.wait(timeout=240)
        agents = [member for member in family if is_agent(member)]
        _, alive = psutil.wait_procs([member for member in family if member not in agents], timeout=30)
        names = [orphan.name() for orphan in alive]
        for orphan in [*alive, *agents]:
            with suppress(psutil.NoSuchProcess):
                orphan.kill()
        return names


@pytest.fixture(scope="session")
def days(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Place]:
    """Makes places; the stages before training run once."""
    from pipelines.dataset import build_dataset
    from pipelines.rationales import build_rationales

    folder: Path = tmp_path_factory.mktemp("days")
    said = [{**row, "text": f"It was a {row['label']} day. So the answer is {row['label']}."} for row in DAYS]
    for row in said[:4]:
        row["text"] = "I can't tell."
    ends = {"validation": "Yes.", "test": "No."}
    held_out = {split: [{**row, "day": f"{row['day']} {end}"} for row in DAYS] for split, end in ends.items()}
    for name, rows in {"train": DAYS, "texts": said, **held_out}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "days", "input": "{day}", "answer": {"kind": "choice", "labels": list(LABELS)}}
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    source = {"root": str(folder), "near_duplicates": "keep"}
    source |= {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    places = {"storage": str(folder / "runs"), "task": str(folder / "task.yaml"), "source": source}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **places}))
    made = Lineage(load_recipe(str(folder / "recipe.yaml")))
    build_rationales(made)
    build_dataset(made)
    return lambda where: Place(folder, where)


@pytest.fixture
def place(days: Callable[[Path], Place], tmp_path: Path) -> Place:
    return days(tmp_path)
