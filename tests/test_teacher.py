from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines import teacher
from pipelines.engines import Completion, Request
from pipelines.errors import UserError
from pipelines.examples import build_examples
from pipelines.lineage import ROWS, Lineage
from pipelines.schema import GENERATIONS
from pipelines.teacher import (
    Asking,
    ask,
    keys_on_disk,
    make_keys,
    write_texts,
)

MakeLine = Callable[..., Lineage]


class Echo:
    """An engine that gives back what it was asked, to see what that is."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [Completion(repr(request), "stop", input_tokens=1, output_tokens=2) for request in requests]

    def close(self) -> None: ...


def asking(line: Lineage, **keys: Any) -> Asking:
    return Asking(line.generations, line.recipe.teacher, keys.pop("samples", range(1)), **keys)


def write(line: Lineage, name: str, pairs: list[tuple[str, int]]) -> None:
    rows = [dict.fromkeys(GENERATIONS.names) | {"row_id": row_id, "sample": sample} for row_id, sample in pairs]
    line.generations.write_part(f"{ROWS}/{name}", pa.Table.from_pylist(rows, schema=GENERATIONS))


def pending(line: Lineage, **keys: Any) -> list[str]:
    found = teacher.pending(line, asking(line, **keys), keys_on_disk(line.generations))
    rows = [row for _, texts in found for row in texts.to_pylist()]
    return sorted(f"{row['row_id']}/{row['sample']}" for row in rows)


@pytest.fixture
def line(make_line: MakeLine) -> Lineage:
    made = make_line("teacher.temperature=0.5")
    build_examples(made)
    return made


def test_all_is_pending_at_first(line: Lineage) -> None:
    assert len(pending(line)) == 8 + 3 + 4, "train, test and unlabelled"
    assert len(pending(line, samples=range(3))) == 3 * 15
    assert len(set(pending(line, samples=range(3)))) == 3 * 15


def test_what_is_on_disk_is_not_asked_again(line: Lineage) -> None:
    rows = line.examples.read_table("train")["row_id"].to_pylist()
    write(line, "a", [(rows[0], 0), (rows[1], 0), ("of another source", 0)])
    write(line, "b", [(rows[0], 0), (rows[2], 1)])
    assert len(keys_on_disk(line.generations)) == 4, "a text that was written twice counts once"
    left = pending(line)
    assert len(left) == 13
    assert not {f"{rows[0]}/0", f"{rows[1]}/0"} & set(left)
    assert len(pending(line, samples=range(2))) == 30 - 3


def test_a_pass_may_want_a_few_only(line: Lineage) -> None:
    rows = line.examples.read_table("test")["row_id"].to_pylist()
    write(line, "a", [(rows[0], 0)])
    only = make_keys([(rows[0], 0), (rows[1], 0), ("unknown", 0)])
    assert pending(line, only=only) == [f"{rows[1]}/0"]
    assert pending(line, only=make_keys([])) == []


def test_a_part_half_written_is_no_part(line: Lineage) -> None:
    write(line, "a", [("r", 0)])
    folder = line.generations.path(ROWS)
    with open(f"{folder}/.b.abc", "wb") as file:
        file.write(b"PAR1 torn")
    assert keys_on_disk(line.generations).tolist() == [b"r/0"]


def test_where_all_is_there_no_engine_is_started(line: Lineage) -> None:
    pairs = [key.rsplit("/", 1) for key in pending(line)]
    write(line, "a", [(row_id, int(sample)) for row_id, sample in pairs])
    assert ask(line, asking(line)) is None


def test_a_second_run_at_once_is_refused(line: Lineage) -> None:
    with line.generations.lease(), pytest.raises(UserError, match="another run is at work on it"):
        ask(line, asking(line))


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


def test_keys_are_sorted_and_single() -> None:
    assert make_keys([("b", 1), ("a", 10), ("b", 1)]).tolist() == [b"a/10", b"b/1"]
    assert np.issubdtype(make_keys([]).dtype, np.bytes_)
