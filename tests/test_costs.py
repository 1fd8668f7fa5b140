"""What teacher and students took, and what a thousand answers take."""

from typing import Any

import pytest

from pipelines.costs import Took, student_thousand, students_bill, teacher_bill, took
from pipelines.recipe import StudentPrice, Teacher

ASKED = {"rows": 2_000, "input_tokens": 1_000_000, "output_tokens": 100_000, "engine_seconds": 1_800.0}
AGAIN = {"rows": 500, "input_tokens": 250_000, "output_tokens": 25_000, "engine_seconds": 1_800.0}
HOURLY = Teacher.model_validate({"price": {"replica_hour": 4}})


def test_a_teacher_is_paid_for_retries_too() -> None:
    made = teacher_bill(HOURLY, [ASKED, AGAIN])
    assert made is not None
    bill, thousand = made
    assert (bill.count, bill.read, bill.written, bill.hours, bill.money) == (2_500, 1_250_000, 125_000, 1.0, 4.0)
    assert (thousand.seconds, thousand.written, thousand.money) == (1_440, 50_000, 1.6)


def test_an_endpoint_is_paid_by_tokens() -> None:
    price = {"million_input_tokens": 2, "million_output_tokens": 10}
    made = teacher_bill(Teacher.model_validate({"price": price}), [ASKED])
    assert made is not None
    assert made[0].money == pytest.approx(3)


def test_without_a_price_there_is_no_money_and_of_given_texts_nothing_is_known() -> None:
    made = teacher_bill(Teacher(), [ASKED])
    assert made is not None
    assert (made[0].money, made[1].money) == (None, None)
    given = Teacher.model_validate({"engine": "outputs", "outputs": {"train": "texts.jsonl"}})
    assert teacher_bill(given, [{"rows": 800}]) is None


def trained(**keys: Any) -> dict[str, Any]:
    recipe = {"student": {"workers": 2}}
    return {"seconds": 900.0, "train_seconds": 600.0, "recipe": recipe, "tokens": {"read": 70, "written": 30}} | keys


def test_workers_are_paid_while_they_start_and_through_every_attempt() -> None:
    assert took(trained()) == Took(1_800.0, 70, 30)
    gone_on = took(trained(seconds=100.0))
    assert gone_on.worker_seconds == 1_200, "the steps before it was killed count"
    bill = students_bill(StudentPrice(worker_hour=3), [took(trained()), Took(1_800.0, 5, 5)])
    assert (bill.count, bill.read, bill.written, bill.hours, bill.money) == (2, 75, 35, 1.0, 3.0)


def test_tokens_that_some_did_not_count_are_not_known() -> None:
    bill = students_bill(StudentPrice(), [took(trained()), Took(1.0, None, None)])
    assert (bill.read, bill.written, bill.money) == (None, None, None)


def test_a_thousand_answers_of_a_student() -> None:
    thousand = student_thousand(StudentPrice(replica_hour=0.36), {"milliseconds": 20.0})
    assert (thousand.seconds, thousand.written) == (20.0, 0.0)
    assert thousand.money == pytest.approx(0.002)
    assert student_thousand(StudentPrice(), {"milliseconds": 20.0}).money is None
