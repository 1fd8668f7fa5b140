from collections.abc import Callable

import pyarrow as pa
import pytest

from pipelines.errors import UserError
from pipelines.examples import build_examples
from pipelines.lineage import ROWS, Lineage
from pipelines.pending import Asking, keys_on_disk, pending
from pipelines.schema import GENERATIONS
from pipelines.teacher import ask

MakeLine = Callable[..., Lineage]


@pytest.fixture
def line(make_line: MakeLine) -> Lineage:
    made = make_line()
    build_examples(made)
    return made


def asking(line: Lineage) -> Asking:
    return Asking(line.generations, line.recipe.teacher, range(1))


def test_where_all_is_there_no_engine_is_started(line: Lineage) -> None:
    wanted = pending(line, asking(line), keys_on_disk(line.generations))
    row_ids = [row_id for _, texts in wanted for row_id in texts["row_id"].to_pylist()]
    rows = [dict.fromkeys(GENERATIONS.names) | {"row_id": row_id, "sample": 0} for row_id in row_ids]
    line.generations.write_part(f"{ROWS}/a", pa.Table.from_pylist(rows, schema=GENERATIONS))
    assert ask(line, asking(line)) is None


def test_a_second_run_at_once_is_refused(line: Lineage) -> None:
    with line.generations.lease(), pytest.raises(UserError, match="another run is at work on it"):
        ask(line, asking(line))
