"""What a command line of ours is read as."""

import shlex
from collections.abc import Callable
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

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
