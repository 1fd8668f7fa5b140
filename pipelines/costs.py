"""What teacher and students took in tokens, hours and money, and what a thousand answers of each take.

Pure functions of manifests and prices. Money, in the currency of the recipe's prices, is None where there is none.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.meter import cost
from pipelines.recipe import StudentPrice, Teacher

Manifest = dict[str, Any]
_ACCOUNT = ("rows", "input_tokens", "output_tokens", "engine_seconds")


@dataclass(frozen=True)
class Bill:
    """What the teacher, or the students, took."""

    count: int  # texts, or students
    read: int | None  # tokens of prompts, or that encoders read; None: not counted
    written: int | None  # tokens of texts, or that decoders learnt to write
    hours: float  # of engines, or of workers; idle and starting ones count
    money: float | None


@dataclass(frozen=True)
class Took:
    """What one student took."""

    worker_seconds: float
    read: int | None
    written: int | None


@dataclass(frozen=True)
class Thousand:
    """What a thousand answers take."""

    seconds: float  # of an engine, or of a replica
    written: float  # tokens
    money: float | None


def teacher_bill(teacher: Teacher, asked: Sequence[Manifest]) -> tuple[Bill, Thousand] | None:
    """Over all texts that were asked for; None where they were given.

    Args:
        asked: of the texts' artefacts: the first asking, retries, those with the gold label told.
    """
    account: Counter[str] = Counter()
    for manifest in asked:
        account.update({name: manifest.get(name, 0) for name in _ACCOUNT})
    if teacher.engine == "outputs" or not account["rows"]:
        return None
    money = cost(teacher.price, account) if any(teacher.price.model_dump().values()) else None
    thousandth = account["rows"] / 1000
    return (
        Bill(
            account["rows"],
            account["input_tokens"],
            account["output_tokens"],
            account["engine_seconds"] / 3600,
            money,
        ),
        Thousand(
            account["engine_seconds"] / thousandth,
            account["output_tokens"] / thousandth,
            None if money is None else money / thousandth,
        ),
    )


def took(trained: Manifest) -> Took:
    """Of a student that was trained to its end."""
    tokens = trained.get("tokens", {"read": None, "written": None})  # of trainings that did not count them yet
    seconds = max(trained["seconds"], trained["train_seconds"])  # the first is of the last attempt alone
    return Took(seconds * trained["recipe"]["student"]["workers"], tokens["read"], tokens["written"])


def students_bill(price: StudentPrice, each: Sequence[Took]) -> Bill:
    """Over students."""
    hours = sum(student.worker_seconds for student in each) / 3600
    read, written = ([getattr(student, name) for student in each] for name in ("read", "written"))
    return Bill(
        len(each),
        None if None in read else sum(read),
        None if None in written else sum(written),
        hours,
        hours * price.worker_hour if price.worker_hour else None,
    )


def student_thousand(price: StudentPrice, metrics: dict[str, Any]) -> Thousand:
    """Of one student that answers one input at a time: it has the label alone to write.

    Args:
        metrics: of its evaluation.
    """
    seconds = float(metrics["milliseconds"])  # of one answer in milliseconds, so of a thousand in seconds
    return Thousand(seconds, 0.0, seconds / 3600 * price.replica_hour if price.replica_hour else None)
