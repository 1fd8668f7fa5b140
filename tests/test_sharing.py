"""Several people, one storage: recipes of one name that say different things, and one recipe that two run at once."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.dataset import build_dataset
from pipelines.errors import UserError
from pipelines.examples import build_examples
from pipelines.lineage import Lineage
from pipelines.rationales import build_rationales

MakeLine = Callable[..., Lineage]
WORDS = ("sun", "rain")


def of_person(make_line: MakeLine, word: str) -> Lineage:
    """The recipe `small` of someone with data of their own."""
    rows = [{"text": f"{word} {n}", "label": ("good", "bad")[n % 2]} for n in range(8)]
    texts = [f"The {word} was {row['label']}, they say. So the answer is {row['label']}." for row in rows]
    return make_line(rows={"train": rows}, texts={"train": texts})


def files(line: Lineage) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(line.store.root).rglob("*") if path.is_file()}


def test_one_name_and_other_content_are_other_artefacts(make_line: MakeLine) -> None:
    made: list[Lineage] = []
    kept: dict[Path, bytes] = {}
    for word in WORDS:
        line = of_person(make_line, word)
        build_rationales(line)
        build_dataset(line)
        learnt = [*line.dataset.iter_rows("train")]
        assert {row["input"].split()[0] for row in learnt} == {word}
        assert all(word in row["rationales"][0]["rationale"] for row in learnt)
        assert kept.items() <= files(line).items(), "nothing of the first is touched"
        kept = files(line)
        made.append(line)
    assert made[0].store == made[1].store
    for stage in ("examples", "generations", "rationales", "dataset"):
        assert getattr(made[0], stage).key != getattr(made[1], stage).key
        assert all(getattr(line, stage).done() for line in made)


@pytest.mark.parametrize("stage", ["examples", "generations", "rationales", "dataset"])
def test_of_two_at_once_the_second_is_refused_and_leaves_the_first_alone(make_line: MakeLine, stage: str) -> None:
    line = of_person(make_line, "sun")
    build = {"examples": build_examples, "dataset": build_dataset}.get(stage, build_rationales)
    artifact = getattr(line, stage)
    if stage == "dataset":
        build_rationales(line)
    with artifact.lease():
        artifact.write_table("train/00000", pa.table({"half": ["of it"]}))
        with pytest.raises(UserError, match=f"{artifact.key}: another run is at work on it"):
            build(line)
        assert artifact.read_table("train").to_pylist() == [{"half": "of it"}]
    build(line)
    assert artifact.done()
