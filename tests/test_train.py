"""What can't be trained is refused before anything is started."""

from collections.abc import Callable

import pytest

from pipelines.dataset import build_dataset
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.rationales import build_rationales
from pipelines.recipe import Run
from pipelines.train import train_students

MakeLine = Callable[..., Lineage]
GOLD = {"good": "bad", "bad": "good"}  # and what is wrong


def ready(make_line: MakeLine, *overrides: str, right: bool = True) -> Lineage:
    """Eight gold labels, three rows of validation; a teacher whose texts all agree with gold, or none."""
    task = make_line().task
    texts = []
    for n in range(8):
        label = ("good", "bad")[n % 2]
        said = f"One can see that it is so. So the answer is {label if right else GOLD[label]}."
        texts.append({"row_id": task.row_id(f"train {n}"), "text": said})
    line = make_line("student.batch_size=4", *overrides, texts={"train": texts})
    build_rationales(line)
    build_dataset(line)
    return line


def refusal(line: Lineage, **run: object) -> str:
    with pytest.raises(UserError) as refused:
        train_students(line, [Run.model_validate({"arm": "step_by_step"} | run)])
    return str(refused.value)


def test_without_any_accepted_rationale_there_is_nothing_to_explain(make_line: MakeLine) -> None:
    line = ready(make_line, right=False)
    assert refusal(line) == (
        "step_by_step-gold-1-seed0: no row has an accepted rationale, so there is nothing to explain; see the funnel"
    )


def test_a_fraction_that_leaves_fewer_rows_than_a_batch(make_line: MakeLine) -> None:
    assert "fraction 0.25 leaves 2 rows, fewer than student.batch_size 4" in refusal(ready(make_line), fraction=0.25)


def test_no_row_with_the_labels_that_are_asked_for(make_line: MakeLine) -> None:
    line = make_line(
        rows={
            "train": [{"text": f"train {n}"} for n in range(8)],
            "validation": [{"text": "validation", "label": "good"}],
        },
        texts={"train": [{"row_id": "of no row", "text": "It is so. So the answer is good."}]},
    )
    build_rationales(line)
    build_dataset(line)
    assert refusal(line).endswith("the dataset has no row with a gold label")
    assert refusal(line, labels="teacher").endswith("the dataset has no row with a teacher label")


def test_a_metric_that_the_task_has_not_is_refused(make_line: MakeLine) -> None:
    open_answers = {"answer": {"kind": "text"}}
    with pytest.raises(
        UserError, match="macro_f1 needs a closed set of labels, and answers of task mood are of kind text"
    ):
        make_line("student.metric=macro_f1", task=open_answers).student(Run(arm="standard"))
    assert make_line("student.metric=macro_f1").student(Run(arm="standard")).stage == "train"


def test_without_gold_no_checkpoint_can_be_chosen(make_line: MakeLine) -> None:
    line = make_line(
        rows={"train": [{"text": f"train {n}"} for n in range(8)]},
        texts={"train": [{"row_id": "of no row", "text": "It is so. So the answer is good."}]},
    )
    build_rationales(line)
    build_dataset(line)
    assert "no validation rows, so no checkpoint can be chosen; give source.validation" in refusal(line)
