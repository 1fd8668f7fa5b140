"""Which students a search tries, and which it chooses."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipelines.errors import UserError
from pipelines.recipe import Run, Search, load_recipe


def trial(score: float | None, state: str = "done", **run: Any) -> dict[str, Any]:
    return {"run": Run.model_validate({"arm": "step_by_step", **run}), "score": score, "state": state}


def chosen(*trials: dict[str, Any]) -> list[tuple[float | None, int]]:
    from pipelines.search import choose

    return [(run.alpha, run.seed) for run in choose(trials)]


def test_alpha_is_chosen_by_its_mean_over_seeds() -> None:
    lucky = [trial(0.9, alpha=0.25, seed=0), trial(0.5, alpha=0.25, seed=1)]
    steady = [trial(0.75, alpha=0.75, seed=0), trial(0.74, alpha=0.75, seed=1)]
    assert chosen(*lucky, *steady) == [(0.75, 0), (0.75, 1)]


def test_one_that_was_stopped_early_counts_with_what_it_had() -> None:
    trials = [trial(0.6, "stopped", alpha=0.25), trial(0.5, alpha=0.75)]
    assert chosen(*trials) == [(0.25, 0)]


def test_fewer_seeds_are_never_better_and_a_failed_student_is_not_chosen() -> None:
    failed = [trial(0.99, alpha=0.25, seed=0), trial(None, "failed", alpha=0.25, seed=1)]
    whole = [trial(0.5, alpha=0.75, seed=0), trial(0.5, alpha=0.75, seed=1)]
    assert chosen(*failed, *whole) == [(0.75, 0), (0.75, 1)]
    assert chosen(*failed) == [(0.25, 0)]
    assert chosen(trial(None, "failed"), trial(None, "not reached", seed=1)) == []


def test_each_point_chooses_for_itself() -> None:
    trials = [
        trial(0.5, alpha=0.25, fraction=0.5),
        trial(0.6, alpha=0.75, fraction=0.5),
        trial(0.8, alpha=0.25),
        trial(0.7, alpha=0.75),
        trial(0.4, arm="standard"),
        trial(0.3, arm="standard", labels="teacher"),
        trial(0.3, arm="standard", model="other"),
    ]
    assert chosen(*trials) == [(0.75, 0), (0.25, 0), (None, 0), (None, 0), (None, 0)]


# the space


def space(**keys: Any) -> Search:
    return Search.model_validate(keys)


GRID = {"alpha": [0.25, 0.75], "fraction": [0.125, 0.5, 1.0], "seed": [0, 1, 2]}


def test_alpha_is_tried_where_there_are_two_tasks() -> None:
    points = space(space=GRID).points()
    assert len(points) == 3 * 3 + 3 * 3 * 2
    assert {p.alpha for p in points if p.arm == "standard"} == {None}
    assert {p.alpha for p in points if p.arm == "step_by_step"} == {0.25, 0.75}
    one = space(space=GRID | {"arm": "label_first"}).points()
    assert len(one) == 9


def test_teachers_are_tried_where_something_is_learnt_from_them() -> None:
    points = space(space={"teacher": ["large", "lab/small"], "labels": ["gold", "teacher"]}).points()
    assert [(p.arm, p.labels, p.teacher) for p in points] == [
        ("standard", "gold", None),
        ("step_by_step", "gold", "large"),
        ("step_by_step", "gold", "lab/small"),
        ("standard", "teacher", "large"),
        ("step_by_step", "teacher", "large"),
        ("standard", "teacher", "lab/small"),
        ("step_by_step", "teacher", "lab/small"),
    ]
    assert points[2].name == "step_by_step-gold-1-small-seed0"


def test_the_small_preset_is_a_first_look() -> None:
    points = space(space=GRID, preset="small").points()
    assert {(p.fraction, p.seed) for p in points} == {(0.125, 0), (1.0, 0)}
    assert len(points) == 2 * (1 + 2)


def test_a_sample_is_drawn_once_and_trials_are_capped() -> None:
    whole, drawn = space(space=GRID).points(), space(space=GRID, sample=5).points()
    assert drawn == space(space=GRID, sample=5).points()
    assert len(set(drawn)) == 5
    assert set(drawn) < set(whole)
    assert drawn != whole[:5]
    assert space(space=GRID, max_trials=2).points() == whole[:2]


def test_several_grids_are_tried_each_point_once() -> None:
    grids = [{"arm": "standard"}, {"arm": ["standard", "shuffled_rationale"], "alpha": 0.5}]
    assert [p.name for p in space(space=grids).points()] == [
        "standard-gold-1-seed0",
        "shuffled_rationale-gold-1-alpha0.5-seed0",
    ]


@pytest.mark.parametrize(
    "keys",
    [
        {"space": []},
        {"space": {"alpha": []}},
        {"space": {"alpha": 1.5}},
        {"space": {"fraction": 0}},
        {"reduction_factor": 1},
        {"sample": 0},
    ],
)
def test_what_is_no_space_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        space(**keys)


def test_a_runs_own_alpha_and_model_make_the_student_that_the_recipe_would(tmp_path: Path) -> None:
    """The same student has the same key wherever its alpha stands."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "task": "cqa", "source": {"train": "t.jsonl"}}))
    recipe = load_recipe(str(path), ["student.alpha=0.3", "student.revision=abc"])
    assert recipe.student_of(Run(arm="step_by_step")) == recipe.student
    own = recipe.student_of(Run(arm="step_by_step", alpha=0.7, model="google/flan-t5-base"))
    assert (own.alpha, own.model, own.revision) == (0.7, "google/flan-t5-base", None)


def test_what_could_not_be_chosen_or_scored_is_refused_before_anything_is_made(make_line: Any) -> None:
    from pipelines.search import search_students

    train = {"train": [{"text": "a day", "label": "good"}]}
    with pytest.raises(UserError, match=r"source\.test is not given"):
        search_students(make_line(rows=train))
    missing = make_line("search.space={model: ./absent}", "evaluate.split=validation", rows=train)
    with pytest.raises(UserError, match=r"\./absent"):
        search_students(missing)
    assert not missing.examples.done()


# early stopping


@pytest.mark.slow  # it imports Ray
def test_asha_compares_within_a_group_alone() -> None:
    from ray.tune.schedulers import TrialScheduler

    from pipelines.asha import AshaByGroup

    class Trial:
        def __init__(self, number: int, group: str) -> None:
            self.trial_id, self.config = str(number), {"group": group}

    scheduler = AshaByGroup(
        lambda config: config["group"], time_attr="step", max_t=8, grace_period=2, reduction_factor=2
    )
    scheduler.set_search_properties("accuracy", "max")
    trials = [Trial(number, group) for number, group in enumerate("aabb")]
    for made in trials:
        scheduler.on_trial_add(None, made)

    def look(number: int, accuracy: float, step: int = 2) -> str:
        return scheduler.on_trial_result(None, trials[number], {"step": step, "accuracy": accuracy})

    assert look(0, 0.9) == TrialScheduler.CONTINUE
    assert look(2, 0.1) == TrialScheduler.CONTINUE, "the first of its group, however bad beside others"
    assert look(1, 0.5) == TrialScheduler.STOP
    assert look(3, 0.2) == TrialScheduler.CONTINUE
    assert look(0, 0.9, step=8) == TrialScheduler.CONTINUE, "one at its last step ends by itself"
