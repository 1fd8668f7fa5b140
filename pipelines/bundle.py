"""What lies beside a student's weights, and how a bundle is opened.

A student's directory is a Hugging Face one with `distill.json` beside it: the task, and how the student was taught to
answer. A bundle is such a directory with what export adds: a name, a version, a calibration, checksums.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.checksums import SUMS, verify_checksums
from pipelines.errors import UserError
from pipelines.tasks import Task

SIDECAR = "distill.json"
Precision = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True)
class Bundle:
    """What export adds to a student.

    The temperature divides the log-probabilities of the possible answers (Guo et al., ICML 2017, arXiv 1706.04599);
    of a decoded text these are that text and any other.
    """

    name: str
    version: str
    temperature: float = 1.0
    abstain_below: float = 0.0
    precision: Precision = "fp32"  # what it was calibrated in


@dataclass(frozen=True)
class Sidecar:
    """What stands beside a student's weights."""

    task: Task
    settings: dict[str, Any]  # further arguments of `Predictor`
    bundle: Bundle | None


def read_bundle(folder: str | Path) -> Sidecar:
    """What a student's directory or a bundle says of itself; a bundle's files are checked against their sums.

    Raises:
        UserError: it is neither, or a file of the bundle is not what was exported.
    """
    folder = Path(folder)
    if not (folder / SIDECAR).is_file():
        raise UserError(f"{folder}: no {SIDECAR} in it; give the directory of a student that `distill train` made")
    sealed = (folder / SUMS).is_file()
    if sealed:
        verify_checksums(folder)
    try:
        facts = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        given = facts.get("bundle")
        bundle = Bundle(**given) if given else None
        settings = {key: facts[key] for key in ("max_input_tokens", "max_new_tokens", "arm", "prefix")}
        made = Sidecar(Task.model_validate(facts["task"]), settings, bundle)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: its {SIDECAR} is not one that this version writes; make it again") from error
    if bundle and not sealed:
        raise UserError(f"{folder}: it is a bundle without its {SUMS}; copy the whole bundle again")
    return made
