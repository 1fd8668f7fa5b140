"""A user's folder, nodes, and what a command line of ours is read as."""

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from cluster.local import Node, cluster_folder
from pipelines.cli import app


@pytest.fixture
def parsed() -> Callable[[str], tuple[str, dict[str, Any]]]:
    """`parsed("python -m pipelines run quickstart")`: what our command line reads in a command of a cluster; it fails
    where it would refuse."""

    def parse(command: str) -> tuple[str, dict[str, Any]]:
        python, flag, module, stage, *arguments = shlex.split(command)
        assert (python, flag, module) == ("python", "-m", "pipelines")
        group = get_command(app)
        assert isinstance(group, TyperGroup)
        return stage, group.commands[stage].make_context(stage, arguments).params

    return parse


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder, with 40 rows and the texts of a teacher."""
    folder = tmp_path / "project"
    for name in ("models", "runs", ".venv"):
        (folder / name).mkdir(parents=True)
        (folder / name / "large").write_bytes(bytes(100))
    rows = [{"text": f"Day {n}.", "label": ("good", "bad")[n % 2]} for n in range(40)]
    texts = [f"It was a {row['label']} day, they say. So the answer is {row['label']}." for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.json").write_text(json.dumps(texts))
    task = {"name": "days", "input": "{text}", "answer": {"kind": "choice", "labels": ["good", "bad"]}}
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    recipe = {
        "name": f"days-{tmp_path.name}",
        "storage": str(tmp_path / "storage"),
        "task": "task.yaml",
        "source": {"train": "rows.jsonl"},
        "teacher": {"engine": "outputs", "outputs": {"train": "texts.json"}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def add_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Node]]:
    """`add_node()`: a worker of one CPU in a cluster whose head has none; `RAY_ADDRESS` is the cluster's."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", os.urandom(16).hex())
    with cluster_folder() as folder, ExitStack() as nodes:
        head = nodes.enter_context(Node(folder)).wait()
        monkeypatch.setenv("RAY_ADDRESS", head.address)
        yield lambda **more: nodes.enter_context(Node(folder, head.address, num_cpus=1, **more)).wait()
