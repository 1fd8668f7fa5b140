"""The recipe and the user's DeepSpeed config as one."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.deepspeed_config import deepspeed_config, read_config
from pipelines.errors import UserError
from pipelines.recipe import Student

STUDENT = Student(
    batch_size=32, workers=2, gradient_accumulation=4, zero_stage=2, learning_rate=1e-4, deepspeed="ds.json"
)


def test_the_recipe_alone() -> None:
    assert deepspeed_config(STUDENT) == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": True, "lr": 1e-4}},
        "zero_optimization": {"stage": 2},
    }


def test_what_the_recipe_has_no_key_for_is_taken_over() -> None:
    given = {
        "gradient_clipping": 0.5,
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": "auto"},
        "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95], "lr": "auto"}},
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 4,
    }
    made = deepspeed_config(STUDENT, given)
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"] == {"overlap_comm": True, "stage": 2}
    assert made["optimizer"] == {"type": "Adam", "params": {"betas": [0.9, 0.95], "lr": 1e-4}}
    assert made["train_batch_size"] == 32
    assert given["train_batch_size"] == "auto", "what was given is left as it is"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64, but the recipe's batch_size comes to 32"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage is 3, .* zero_stage comes to 2"),
        ({"optimizer": {"params": {"lr": 1.0}}}, r"optimizer.params.lr is 1.0, .* learning_rate comes to 0.0001"),
        ({"fp16": {"enabled": True}}, "overflow"),
        ({"scheduler": {"type": "WarmupLR"}}, "warmup_steps"),
    ],
)
def test_conflicts_are_named(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"ds.json.*{sentence}"):
        deepspeed_config(STUDENT, given)


def test_bf16_needs_the_recipe_to_say_so() -> None:
    given = {"bf16": {"enabled": True}}
    assert deepspeed_config(STUDENT, given)["bf16"] == {"enabled": True}
    with pytest.raises(UserError, match=r"student\.precision is fp32"):
        deepspeed_config(STUDENT.model_copy(update={"precision": "fp32"}), given)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_clipping": 0.1}))
    assert read_config(str(path)) == {"gradient_clipping": 0.1}


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_what_is_no_config_is_refused_in_words(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"ds\.json: .*JSON"):
        read_config(str(path))
