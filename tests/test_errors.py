from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import explain_invalid


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Wheel(Strict):
    spokes: int = Field(default=32, ge=1)


class Bicycle(Strict):
    colour: Literal["red", "green"] = "red"
    front: Wheel = Wheel()
    spare: Wheel | None = None
    others: tuple[Wheel, ...] = ()
    by_name: dict[str, Wheel] = {}
    owner: str = Field(default="me", pattern="^[a-z]+$")

    @model_validator(mode="after")
    def _rides(self) -> "Bicycle":
        if self.owner == "nobody":
            raise ValueError("`owner` must be somebody")
        return self


def explained(**content: Any) -> str:
    with pytest.raises(ValidationError) as error:
        Bicycle.model_validate(content)
    return explain_invalid("my.yaml", Bicycle, error.value)


@pytest.mark.parametrize(
    ("content", "key", "near"),
    [
        ({"color": "red"}, "color", "colour"),
        ({"front": {"spoke": 1}}, "front.spoke", "spokes"),
        ({"spare": {"spoke": 1}}, "spare.spoke", "spokes"),
        ({"others": [{}, {"spoke": 1}]}, "others.1.spoke", "spokes"),
        ({"by_name": {"left": {"spoke": 1}}}, "by_name.left.spoke", "spokes"),
    ],
)
def test_an_unknown_key_at_any_depth_comes_with_the_nearest_name(content: dict[str, Any], key: str, near: str) -> None:
    assert explained(**content) == f"my.yaml: unknown key {key!r}; did you mean {near!r}?"


def test_an_unknown_key_like_no_other_comes_with_all_names() -> None:
    assert explained(front={"zzz": 1}) == "my.yaml: unknown key 'front.zzz'; known keys are spokes"


def test_an_unknown_key_goes_before_other_problems() -> None:
    assert explained(colour=3, color="red") == "my.yaml: unknown key 'color'; did you mean 'colour'? (1 of 2 problems)"


def test_a_wrong_value_is_shown_with_what_was_expected() -> None:
    assert explained(colour="blue") == "my.yaml: colour: input should be 'red' or 'green', not 'blue'"
    assert explained(front={"spokes": 0}).endswith("input should be greater than or equal to 1, not 0")
    assert explained(owner="A").endswith("string should match pattern '^[a-z]+$', not 'A'")


def test_a_rule_between_keys_speaks_for_itself() -> None:
    assert explained(owner="nobody") == "my.yaml: `owner` must be somebody"


def test_a_huge_value_does_not_flood_the_sentence() -> None:
    sentence = explained(front=["x\n" * 50_000])
    assert len(sentence) < 300
    assert "\n" not in sentence
