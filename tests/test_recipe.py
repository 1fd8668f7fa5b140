from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipelines.errors import UserError
from pipelines.recipe import PACKAGE, SHIPPED, Grid, Recipe, Run, load_recipe

CONTENT: dict[str, Any] = {"name": "mine", "task": "cqa", "source": {"train": "train.jsonl"}}


def recipe(**keys: Any) -> Recipe:
    return Recipe.model_validate(CONTENT | keys)


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(CONTENT | {"runs": [{"arm": "standard"}]}))
    return str(file)


def problem(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", sorted(p.stem for p in SHIPPED.glob("*.yaml")))
def test_every_shipped_recipe_loads_under_its_own_name(name: str) -> None:
    assert load_recipe(name).name == name
    assert load_recipe(name).students()


def test_a_recipe_needs_a_name_a_task_and_a_source_and_nothing_else() -> None:
    assert recipe().student.alpha == 0.5
    for key in CONTENT:
        with pytest.raises(ValidationError, match=rf"{key}\n.*Field required"):
            Recipe.model_validate({k: v for k, v in CONTENT.items() if k != key})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("taks=cqa", "unknown key 'taks'; did you mean 'task'?"),
        ("student.learning_rat=1", "unknown key 'student.learning_rat'; did you mean 'learning_rate'?"),
        ("runs=[{arms: standard}]", "unknown key 'runs.0.arms'; did you mean 'arm'?"),
        ("student.gpu=1", "did you mean 'gpus'?"),
    ],
)
def test_an_unknown_key_at_any_depth_comes_with_the_nearest_name(path: str, override: str, said: str) -> None:
    assert said in problem(path, override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("student.steps=many", "student.steps: input should be a valid integer"),
        ("student.steps=1.5", "student.steps: input should be a valid integer"),
        ("student.alpha=1.1", "student.alpha: input should be less than or equal to 1"),
        ("student=t5", "student: input should be a valid dictionary"),
        ("student.precision=fp16", "student.precision: t5's activations overflow in fp16"),
        (
            "student={batch_size: 10, workers: 3}",
            "batch_size 10 must be a multiple of workers * gradient_accumulation, 3",
        ),
        ("source.limit=0", "source.limit"),
        ("source={test: x}", "give `train` or `unlabelled`"),
        ("teacher.replicas=[2, 1]", "1 <= min <= max"),
        ("teacher.replicas=2", "teacher.replicas"),
        ("teacher.engine=outputs", "engine outputs needs `outputs`"),
        ("teacher.splits=[train, dev]", "teacher.splits.1"),
        ("teacher.outputs={dev: x}", "teacher.outputs.dev"),
        ("runs=[{fraction: 0}]", "runs.0.fraction"),
        ("runs=[{fraction: [0.5, 1.5]}]", "runs.0.fraction.1"),
        ("runs=[{arm: both}]", "runs.0.arm"),
        ("name=a/b", "name"),
        ("name=..", "name"),
    ],
)
def test_a_wrong_value_names_its_key(path: str, override: str, said: str) -> None:
    message = problem(path, override)
    assert message.startswith(path)
    assert said in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("student.steps", "write it as key.path=value"),
        ("=3", "write it as key.path=value"),
        ("name.first=a", "'name' is a value, not a group of keys"),
        ("runs.0.arm=standard", "'runs' is a value, not a group of keys"),
        ("student.steps=[1", "the value is not YAML"),
    ],
)
def test_a_malformed_override_is_shown(path: str, override: str, said: str) -> None:
    assert problem(path, override).startswith(f"--set {override}: ")
    assert said in problem(path, override)


def test_overrides_reach_any_depth_and_the_last_one_wins(path: str) -> None:
    made = load_recipe(
        path,
        [
            "student.steps=5",
            "student.learning_rate=1e-4",
            "teacher.engine_args.max_model_len=64",
            "teacher.splits=[train]",
            "runs=[{arm: step_by_step, fraction: [0.5, 1]}]",
            "source.validation=a=b.jsonl",
            "student.steps=7",
        ],
    )
    assert made.student.steps == 7
    assert made.student.learning_rate == 1e-4
    assert made.teacher.engine_args == {"max_model_len": 64}
    assert made.teacher.splits == ("train",)
    assert made.source.validation == "a=b.jsonl"
    assert [(run.arm, run.fraction) for run in made.students()] == [("step_by_step", 0.5), ("step_by_step", 1.0)]


def test_the_papers_lambda_becomes_alpha(path: str) -> None:
    assert load_recipe(path, ["student.lambda=1"]).student == load_recipe(path, ["student.alpha=0.5"]).student
    assert load_recipe(path, ["student.lambda=3"]).student.alpha == 0.25
    assert load_recipe(path, ["student.lambda=0"]).student.alpha == 1.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["student.lambda=1", "student.alpha=0.5"], "give one of the two"),
        (["student.lambda=-1"], "lambda must be a number from 0 on"),
        (["student.lambda=much"], "lambda must be a number from 0 on"),
        (["student.rationales=per_teacher", "runs=[{arm: label_first}]"], "arm label_first has one target"),
        (["student.prefix=decoder", "runs=[{arm: rationale_first}]"], "arm rationale_first has one"),
        (["student.batch_size=12", "student.workers=2", "student.gradient_accumulation=4"], "a multiple of"),
    ],
)
def test_what_does_not_go_together_is_said(path: str, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe(path, overrides)


def test_an_empty_value_takes_a_key_back(path: str) -> None:
    assert load_recipe(path, ["source.test=x", "source.test="]).source.test is None


def test_a_group_that_the_file_leaves_empty_can_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(CONTENT) + "student:\n")
    assert load_recipe(str(tmp_path / "r.yaml"), ["student.steps=5"]).student.steps == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "a recipe is a mapping"),
        (b"- a", "a recipe is a mapping"),
        (b"name: [", "not readable as YAML"),
        (b"name: \xff", "not readable as YAML"),
        (b"name: a\x00b", "not readable as YAML"),
        (b"1: a", "name: field required"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    assert problem(str(tmp_path / "r.yaml")).startswith(str(tmp_path / "r.yaml"))
    assert said in problem(str(tmp_path / "r.yaml"))


def test_a_recipe_that_does_not_exist_names_those_that_do() -> None:
    assert problem("quikstart").startswith("recipe 'quikstart' is neither a file nor one of ")
    assert "quickstart" in problem("quikstart")


def test_a_recipe_is_frozen() -> None:
    made = recipe()
    with pytest.raises(ValidationError, match="frozen"):
        made.student.alpha = 0.1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        made.name = "other"  # type: ignore[misc]


def test_a_recipe_survives_the_manifest() -> None:
    made = load_recipe("quickstart")
    assert Recipe.model_validate(made.model_dump(mode="json")) == made


# where the data lie


def test_relative_paths_lie_under_root_and_others_do_not() -> None:
    source = recipe(
        source={"root": "data/", "train": "a.jsonl", "test": "/b.jsonl", "unlabelled": "s3://c/d.jsonl"}
    ).source
    assert source.files() == {"train": "data/a.jsonl", "test": "/b.jsonl", "unlabelled": "s3://c/d.jsonl"}


def test_builtin_paths_lie_in_the_package() -> None:
    files = load_recipe("quickstart").source.files()
    assert files["train"] == str(PACKAGE / "quickstart/data/train.jsonl")
    assert list(files) == ["train", "validation", "test", "unlabelled"]


# the grid of students


def test_a_value_may_stand_without_brackets() -> None:
    assert Grid.model_validate({"arm": "standard", "fraction": 0.5, "seed": 1}).runs() == [
        Run(arm="standard", fraction=0.5, seed=1)
    ]
    assert (
        Grid.model_validate({"arm": ["standard"], "fraction": [0.5], "seed": [1]}).runs()
        == Grid.model_validate({"arm": "standard", "fraction": 0.5, "seed": 1}).runs()
    )


def test_a_grid_is_every_combination() -> None:
    runs = Grid.model_validate({"fraction": [0.125, 1.0], "seed": [0, 1, 2], "labels": ["gold", "teacher"]}).runs()
    assert len(runs) == len(set(runs)) == 2 * 2 * 3 * 2


@pytest.mark.parametrize("key", ["arm", "labels", "fraction", "seed"])
def test_a_grid_of_nothing_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        Grid.model_validate({key: []})


def test_a_student_that_two_grids_name_is_trained_once() -> None:
    made = recipe(runs=[{"fraction": [0.5, 1.0]}, {"arm": "standard", "fraction": [1.0, 0.25]}])
    students = made.students()
    assert [(run.arm, run.fraction) for run in students] == [
        ("standard", 0.5),
        ("step_by_step", 0.5),
        ("standard", 1.0),
        ("step_by_step", 1.0),
        ("standard", 0.25),
    ]
    assert len({run.name for run in students}) == len(students)
