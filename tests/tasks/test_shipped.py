"""The task files that come with the package, and how well a real teacher's real texts are read with them.

The texts are the published outputs of a large model (PaLM 540B) on the four sets. They are not part of this
project: the environment variable STEPDISTILL_REFERENCE names the folder that holds them.
"""

import json
import os
from collections import Counter
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pipelines.prompts import completion, completion_prompt, prompt_hash, stop_strings
from pipelines.replies import Reply, cites_hint, only_answer, read_reply
from pipelines.schema import Reason
from pipelines.tasks import Task, load_task
from pipelines.tasks.task import LETTERS, SHIPPED, Length

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
ROOT = Path(__file__).parents[2]
REFERENCE = Path(os.environ.get("STEPDISTILL_REFERENCE", ROOT.parent / "shared/data/reference"))

# task, folder, split, rows, how many of them the teacher has right by our reading, and what is published.
# Where ours is more: capital letters in a choice, `(16 * 17) * 4`, and `…, so the answer is …` are read too.
PALM = [
    ("cqa", "cqa", "train", 9741, 7344, 0.743),
    ("cqa", "cqa", "test", 1221, 958, 0.772),
    ("svamp", "svamp", "train", 800, 594, 0.7325),
    ("svamp", "svamp", "test", 200, 156, 0.740),
    ("anli", "anli1", "valid", 1000, 674, 0.668),
    ("esnli", "esnli", "valid", 1000, 731, 0.731),  # its first 1,000 of 9,842 rows; 0.732 is published for all
]


LENGTHS: tuple[Length, ...] = ("short", "medium", "full")
PROMPT_HASHES = {
    "anli": "249f6c75135fed62",
    "cqa": "b2dd49d9331524a4",
    "esnli": "a96bc935a5979bfb",
    "returns_desk": "057a37f256cea373",
    "svamp": "accc299316945c5a",
}


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return load_task(request.param)


def test_the_sets_of_the_paper_and_the_quickstart_are_there() -> None:
    assert {"anli", "cqa", "esnli", "returns_desk", "svamp"} <= set(NAMES)


def test_a_file_is_named_as_its_task(task: Task) -> None:
    assert (SHIPPED / f"{task.name}.yaml").is_file()


def test_there_are_five_to_eight_exemplars_and_all_differ(task: Task) -> None:
    inputs = [task.render(e.input) for e in task.exemplars]
    assert 5 <= len(set(inputs)) == len(inputs) <= 8


@pytest.mark.parametrize("length", LENGTHS)
def test_each_exemplars_own_completion_is_read_back(task: Task, length: Length) -> None:
    for exemplar, rationale in zip(task.exemplars, task.rationales(length), strict=True):
        choices = task.row_choices(exemplar.input)
        text = completion(task, rationale, exemplar.label, choices)
        assert read_reply(task, text, choices) == Reply(rationale, exemplar.label)
        assert not only_answer(task, rationale, exemplar.label)
        assert not cites_hint(task, rationale, exemplar.label)


def test_short_is_a_clause_and_medium_about_half(task: Task) -> None:
    for texts in zip(*map(task.rationales, LENGTHS), strict=True):
        short, medium, full = (len(text.split()) for text in texts)
        assert 3 <= short <= 10
        assert short < medium
        assert 0.4 <= medium / full <= 0.7


@pytest.mark.parametrize("name", PROMPT_HASHES)
def test_the_prompts_are_those_that_texts_were_paid_with(name: str) -> None:
    """The bundled teacher has learnt the returns desk's; and every other hash stands in someone's artefacts."""
    assert prompt_hash(load_task(name)) == PROMPT_HASHES[name]


def test_a_text_that_runs_on_into_the_next_exemplar_is_cut_there(task: Task) -> None:
    first, second = task.exemplars[:2]
    choices = task.row_choices(first.input)
    answer = completion(task, first.rationale.full, first.label, choices)
    run_on = completion_prompt(task.model_copy(update={"exemplars": (), "instruction": ""}), task.render(second.input))
    assert read_reply(task, f"{answer}\n\n{run_on}", choices).label == first.label


def test_no_exemplar_holds_a_stop_string(task: Task) -> None:
    for exemplar in task.exemplars:
        text = completion_prompt(task.model_copy(update={"exemplars": ()}), task.render(exemplar.input))
        answer = completion(task, exemplar.rationale.full, exemplar.label, task.row_choices(exemplar.input))
        assert not any(
            stop in text.removeprefix(task.instruction.strip() + "\n\n") + answer for stop in stop_strings(task)
        )


def test_a_closed_set_of_labels_is_shown_in_balance(task: Task) -> None:
    if task.answer.kind == "choice":
        shown = Counter(e.label for e in task.exemplars)
        assert set(shown) == set(task.answer.labels)
        assert max(shown.values()) - min(shown.values()) <= 1


def test_every_letter_of_cqa_is_an_answer_once_before_any_is_twice() -> None:
    cqa = load_task("cqa")
    shown = Counter(LETTERS[e.input["choices"].index(e.label)] for e in cqa.exemplars)
    assert set(shown) == set("abcde")
    assert max(shown.values()) <= 2


def test_svamp_shows_every_operator_and_two_steps() -> None:
    equations = [e.label for e in load_task("svamp").exemplars]
    assert all(any(sign in equation for equation in equations) for sign in "+-*/")
    assert sum(equation.count("(") == 2 for equation in equations) >= 2


def test_svamp_reasons_with_the_value_of_its_equation() -> None:
    svamp = load_task("svamp")
    for exemplar in svamp.exemplars:
        result = exemplar.rationale.full.rstrip(".").split(" is ")[-1].split()[0]
        assert svamp.same(result, exemplar.label), exemplar.rationale.full


@cache
def teacher_texts(folder: str, split: str) -> list[tuple[dict[str, Any], str]]:
    """The rows of a split with the teacher's texts, which are in the order of the rows, in numbered batches."""
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference data at {REFERENCE}; STEPDISTILL_REFERENCE can name another folder")
    lines = (REFERENCE / folder / f"{folder}_{split}.json").read_text(encoding="utf-8").splitlines()
    texts: list[str] = []
    for number in count():
        batch = REFERENCE / folder / "llm" / f"{split}_CoT_{number}.json"
        if not batch.is_file():
            break
        texts += json.loads(batch.read_text(encoding="utf-8"))
    return list(zip(map(json.loads, lines), texts, strict=True))


def read_all(task: Task, pairs: list[tuple[dict[str, Any], str]]) -> list[tuple[Reply, str | None]]:
    """What is read from each text, with the row's gold label."""
    read = []
    for row, text in pairs:
        choices = task.row_choices(row)
        read.append((read_reply(task, text, choices), task.gold(row[task.label], choices)))
    return read


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder", "split", "rows", "right", "published"), PALM)
def test_the_teachers_accuracy_is_what_is_published_or_more(
    name: str, folder: str, split: str, rows: int, right: int, published: float
) -> None:
    task = load_task(name)
    read = read_all(task, teacher_texts(folder, split)[:rows])
    found = sum(task.same(reply.label, gold) for reply, gold in read)
    assert (len(read), found) == (rows, right)
    assert found / rows >= published


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder", "split"), [case[:3] for case in PALM])
def test_nearly_every_real_text_has_a_label_and_no_rationale_runs_on(name: str, folder: str, split: str) -> None:
    read = read_all(load_task(name), teacher_texts(folder, split))
    assert sum(reply.label is not None for reply, _ in read) / len(read) > 0.95
    assert not any("\n\nQ:" in reply.rationale or "\n\nPremise:" in reply.rationale for reply, _ in read)


@pytest.mark.slow
def test_what_is_refused_of_the_real_choices_names_two_of_them() -> None:
    task = load_task("cqa")
    refused = [reply for reply, _ in read_all(task, teacher_texts("cqa", "test")) if reply.label is None]
    assert {reply.reason for reply in refused} == {Reason.LABEL_NOT_IN_SET}
    two = [reply for reply in refused if " or (" in reply.detail or " and (" in reply.detail]
    assert len(refused) - len(two) == 1, "the other one pairs a letter with the words of another choice"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder", "split"), [case[:3] for case in PALM])
def test_next_to_no_real_rationale_is_taken_for_a_leak(name: str, folder: str, split: str) -> None:
    """The teacher was told nothing: what is found here is found by mistake, but for `337 - 23 = 314.`"""
    task = load_task(name)
    replies = [reply for reply, _ in read_all(task, teacher_texts(folder, split)) if reply.label is not None]
    assert sum(only_answer(task, reply.rationale, reply.label or "") for reply in replies) <= 1
    assert sum(cites_hint(task, reply.rationale, reply.label or "") for reply in replies) <= 2
