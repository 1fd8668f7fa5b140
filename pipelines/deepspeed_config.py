"""The recipe as a DeepSpeed config, with the user's own config file for what the recipe has no key for."""

import json
from typing import Any

import fsspec

from pipelines.errors import UserError
from pipelines.recipe import Student, resolve

Config = dict[str, Any]


def read_config(path: str) -> Config:
    """The user's file.

    Raises:
        UserError: it can't be read as a JSON object.
    """
    try:
        with fsspec.open(resolve(path), "r", encoding="utf-8") as file:
            given = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"student.deepspeed {path}: not readable as JSON: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise UserError(f"student.deepspeed {path}: a DeepSpeed config is a JSON object")
    return given


def deepspeed_config(student: Student, given: Config | None = None) -> Config:
    """The config that `deepspeed.initialize` takes.

    Args:
        given: the user's config. What the recipe decides must be left out of it, be `auto`, or say the same.

    Raises:
        UserError: it says something else; the sentence names the key.
    """
    given = _without_auto(given or {})
    decided: dict[str, tuple[object, str]] = {
        "train_batch_size": (student.batch_size, "batch_size"),
        "train_micro_batch_size_per_gpu": (
            student.batch_size // student.workers // student.gradient_accumulation,
            "batch_size over workers and gradient_accumulation",
        ),
        "gradient_accumulation_steps": (student.gradient_accumulation, "gradient_accumulation"),
        "zero_optimization.stage": (student.zero_stage, "zero_stage"),
        "optimizer.params.lr": (student.learning_rate, "learning_rate"),
    }
    file = f"student.deepspeed {student.deepspeed}"
    for path, (value, key) in decided.items():
        said = _get(given, path)
        if said is not None and said != value:
            raise UserError(
                f"{file}: {path} is {said!r}, but the recipe's {key} comes to {value!r}; "
                'leave it out there, or write "auto"'
            )
    if _get(given, "fp16.enabled"):
        raise UserError(f"{file}: fp16 is switched on, in which T5's activations overflow; leave it out")
    if _get(given, "bf16.enabled") and student.precision != "bf16":
        raise UserError(f"{file}: bf16 is switched on, but student.precision is {student.precision}")
    if "scheduler" in given:
        raise UserError(f"{file}: scheduler is decided by the recipe's warmup_steps and steps; leave it out")
    made: Config = {
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        # torch's own Adam: DeepSpeed's C++ one is compiled at first use
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": True}},
        **given,
    }
    for path, (value, _) in decided.items():
        _set(made, path, value)
    return made


def _without_auto(config: Config) -> Config:
    """The config without the values that are left to the recipe, or to DeepSpeed's own defaults."""
    nested = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in nested.items() if value != "auto"}


def _get(config: Config, path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _set(config: Config, path: str, value: object) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        config[parent] = dict(config.get(parent) or {})
        config = config[parent]
    config[last] = value
