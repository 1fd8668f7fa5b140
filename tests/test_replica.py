"""What a replica writes of the batches of a task, and what it makes of one that was begun before."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pipelines.engines import Completion, Request
from pipelines.examples import build_examples
from pipelines.lineage import ROWS, Lineage
from pipelines.pending import Asking, keys_on_disk, tasks
from pipelines.replica import Replica, write_texts
from pipelines.schema import GENERATIONS

MakeLine = Callable[..., Lineage]


class Echo:
    """An engine that gives back what it was asked, to see what that is."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [Completion(repr(request), "stop", input_tokens=1, output_tokens=2) for request in requests]

    def close(self) -> None: ...


def asking(line: Lineage, **keys: Any) -> Asking:
    return Asking(line.generations, line.recipe.teacher, keys.pop("samples", range(1)), **keys)


@pytest.fixture
def line(make_line: MakeLine) -> Lineage:
    made = make_line("teacher.temperature=0.5")
    build_examples(made)
    return made


ROW = {"row_id": "r", "split": "train", "sample": 0, "input": "Sun.", "choices": None, "label": "bad"}


def texts(line: Lineage, *rows: dict[str, Any], **keys: Any) -> list[str]:
    return [row["text"] for row in write_texts(Echo(), asking(line, **keys), line.task, rows)]


def test_texts_come_with_what_they_were_asked_by(line: Lineage) -> None:
    [made] = write_texts(Echo(), asking(line), line.task, [ROW])
    assert set(made) == set(GENERATIONS.names)
    assert (made["teacher"], made["input_tokens"], made["cached_tokens"]) == (line.recipe.teacher.model, 1, None)
    assert "Fine day." in made["text"]
    assert "Q: Sun." in made["text"]


def test_every_text_has_a_seed_of_its_own(line: Lineage) -> None:
    rows = [ROW, ROW, ROW | {"sample": 1}, ROW | {"row_id": "s"}]
    made = texts(line, *rows)
    assert made[0] == made[1]
    assert len(set(made)) == 3
    other = line.recipe.teacher.model_copy(update={"seed": 1})
    assert write_texts(Echo(), Asking(line.generations, other, range(1)), line.task, [ROW])[0]["text"] != made[0]


def test_without_temperature_no_seed_is_needed(make_line: MakeLine) -> None:
    assert "seed=None" in texts(make_line(), ROW)[0]


def test_a_hint_tells_gold(line: Lineage) -> None:
    assert "The right answer is bad." in texts(line, ROW, hinted=True)[0]
    assert "The right answer is" not in texts(line, ROW)[0]


def test_a_chat_is_messages(make_line: MakeLine) -> None:
    assert "'role': 'user', 'content': 'Sun.'" in texts(make_line("teacher.prompt=chat"), ROW)[0]


def test_a_held_answer_has_its_form(make_line: MakeLine) -> None:
    assert "structural_tag" in texts(make_line("teacher.constrain_answer=true"), ROW)[0]


class Counting(Echo):
    """Dies at a request, if told so."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at, self.asked = dies_at, 0

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.asked += len(requests)
        if self.dies_at is not None and self.asked > self.dies_at:
            raise OSError("the node is gone")
        return super().generate(requests)


def replica(line: Lineage, engine: Echo) -> Replica:
    return Replica(asking(line), line.examples, line.task, line.recipe.curate, engine)


def test_a_task_of_several_batches_ends_as_one_part_and_is_not_asked_again(make_line: MakeLine) -> None:
    line = make_line("teacher.batch_size=12")
    build_examples(line)
    batches = [
        batch for task in tasks(line, asking(line), keys_on_disk(line.generations), 100) for batch in task["batches"]
    ]
    assert len(batches) == 6
    with pytest.raises(OSError, match="gone"):
        replica(line, Counting(dies_at=7)).answer(batches)
    assert len(line.generations.parts(ROWS)) == 2, "what was written before stays"
    again = Counting()
    reports = replica(line, again).answer(batches)
    assert again.asked == 15 - 6
    assert len(reports) == 6
    assert len(line.generations.parts(ROWS)) == 1
    assert line.generations.dataset(ROWS, GENERATIONS).count_rows() == 15
    late = Counting()
    [report] = replica(line, late).answer(batches)
    assert late.asked == 0
    assert report["output_tokens"] == sum(report["output_tokens"] for report in reports) == 30


def test_a_single_batch_is_a_part(line: Lineage) -> None:
    [batch, *_] = (task["batches"] for task in tasks(line, asking(line), keys_on_disk(line.generations), 5))
    [report] = replica(line, Counting()).answer(batch)
    assert len(line.generations.parts(ROWS)) == 1
    assert report["outcomes"]
