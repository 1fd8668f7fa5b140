import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from pipelines.errors import UserError
from pipelines.lineage import ROWS, Lineage
from pipelines.meter import Meter, cost, gpu_hours, spent, telling
from pipelines.recipe import Price, Teacher
from pipelines.schema import GENERATIONS

MakeLine = Callable[..., Lineage]


def report(outcomes: dict[str, int], rejects: list[list[str]] | None = None, **keys: Any) -> dict[str, Any]:
    return {
        "replica": "a",
        "since": 100.0,
        "ready": 110.0,
        "at": 120.0,
        "restarts": 0,
        "stop": "",
        "input_tokens": 50,
        "cached_tokens": 40,
        "output_tokens": 10,
        "outcomes": json.dumps(outcomes),
        "rejects": json.dumps(rejects or []),
    } | keys


def write(line: Lineage, rows: int) -> None:
    """Texts of 50 input and 10 output tokens."""
    row = dict.fromkeys(GENERATIONS.names) | {"input_tokens": 50, "cached_tokens": 40, "output_tokens": 10}
    table = pa.Table.from_pylist([row | {"row_id": str(n), "sample": 0} for n in range(rows)], schema=GENERATIONS)
    line.generations.write_part(f"{ROWS}/{rows}", table)


def make_meter(line: Lineage, pending: int = 1000) -> Meter:
    return Meter(line.recipe, line.generations, pending)


def test_reports_add_up_over_replicas(make_line: MakeLine) -> None:
    with make_meter(make_line()) as meter:
        meter.add(report({"accepted": 4}))
        meter.add(report({"accepted": 3, "unparsable": 1}, at=130.0))
        meter.add(report({"accepted": 2}, replica="b", since=105.0, ready=120.0, at=125.0, restarts=1))
    account = meter.account
    assert {name: account[name] for name in ("rows", "input_tokens", "cached_tokens", "output_tokens")} == {
        "rows": 10,
        "input_tokens": 150,
        "cached_tokens": 120,
        "output_tokens": 30,
    }
    assert account["engine_seconds"] == 30 + 20
    assert (account["replicas"], account["restarts"], account["start_seconds"]) == (2, 1, 15)
    assert account["steady_rate"] == (10 - 4) / (130 - 120)


def test_reports_may_come_out_of_order(make_line: MakeLine) -> None:
    with make_meter(make_line()) as meter:
        meter.add(report({"accepted": 1}, at=130.0))
        meter.add(report({"accepted": 1}, at=120.0))
    assert meter.engine_seconds == 30


def test_what_runs_spend_adds_up(make_line: MakeLine) -> None:
    line = make_line()
    assert spent(line.generations)["rows"] == 0
    for _ in range(2):
        with make_meter(line) as meter:
            meter.add(report({"accepted": 3}))
    write(line, 6)
    paid = spent(line.generations)
    assert paid["engine_seconds"] == 40
    assert [paid[name] for name in ("rows", "input_tokens", "cached_tokens", "output_tokens")] == [6, 300, 240, 60]


def test_a_run_without_a_report_spends_nothing(make_line: MakeLine) -> None:
    line = make_line()
    with make_meter(line):
        pass
    assert spent(line.generations)["rows"] == 0


@pytest.mark.parametrize(("most", "allowed"), [(None, 10), (12, 9), (3, 0), (100, 10)])
def test_a_budget_of_rows_counts_what_was_paid_before(make_line: MakeLine, most: int | None, allowed: int) -> None:
    line = make_line() if most is None else make_line(f"budget.max_rows={most}")
    write(line, 3)
    assert make_meter(line, pending=10).allowed == allowed


def test_a_budget_of_tokens_stops_the_run(make_line: MakeLine) -> None:
    line = make_line("budget.max_tokens=100")
    meter = make_meter(line)
    meter.add(report({"accepted": 1}))
    with pytest.raises(UserError, match=r"budget\.max_tokens is reached at 120 tokens"):
        meter.add(report({"accepted": 1}))


def test_a_budget_of_hours_counts_every_gpu_and_every_run(make_line: MakeLine) -> None:
    line = make_line("budget.max_gpu_hours=1", "teacher.gpus=4")
    with make_meter(line) as meter:
        meter.add(report({"accepted": 1}, at=100 + 800.0))
    with pytest.raises(UserError, match=r"budget\.max_gpu_hours is reached at 1\.11 hours"), make_meter(line) as meter:
        meter.add(report({"accepted": 1}, at=100 + 200.0))
    assert spent(line.generations)["engine_seconds"] == 1000


def test_a_run_that_goes_wrong_stops_early_and_shows_why(
    make_line: MakeLine, capsys: pytest.CaptureFixture[str]
) -> None:
    meter = make_meter(make_line("curate.max_reject_share=0.5"))
    meter.add(report({"unparsable": 99}))
    rejects = [
        ["unparsable", "row1", "no 'So the answer is'", " [Hm] \n\nQ:"],
        ["too_short", "row2", "under 3 words", ""],
    ]
    with pytest.raises(
        UserError, match=r"98% of the first 101 texts are rejected, more than .* 0\.5; .*distill preview"
    ):
        meter.add(report({"accepted": 2}, rejects))
    assert "row1 unparsable: no 'So the answer is'" in capsys.readouterr().out


def test_few_texts_say_nothing_yet(make_line: MakeLine) -> None:
    make_meter(make_line(), pending=20).add(report({"unparsable": 20}))


def test_a_replica_that_can_not_go_on_stops_the_run(make_line: MakeLine) -> None:
    with pytest.raises(UserError, match="the disk is full"):
        make_meter(make_line()).add(report({}, stop="the disk is full"))


def test_the_most_telling_rejects_are_of_every_reason() -> None:
    rejects = [[reason, str(n), "", ""] for n, reason in enumerate("aaaabbbc")]
    assert [f"{reason}{row_id}" for reason, row_id, *_ in telling(rejects)] == ["a0", "b4", "c7", "a1", "b5"]
    assert telling([]) == []


def test_money_is_hours_and_tokens() -> None:
    price = Price(replica_hour=2, million_input_tokens=3, million_output_tokens=10)
    account = {"engine_seconds": 1800, "input_tokens": 2_000_000, "output_tokens": 500_000}
    assert cost(price, account) == 1 + 6 + 5
    assert cost(Price(), account) == 0


def test_an_engine_without_gpu_counts_its_hours() -> None:
    assert gpu_hours(Teacher(), 3600) == 1
    assert gpu_hours(Teacher(gpus=8), 3600) == 8
