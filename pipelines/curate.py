"""Which rationales a student may learn from: pure functions that give each row a reason or none."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.prompts import read_reply
from pipelines.recipe import Curate
from pipelines.schema import Reason
from pipelines.tasks import Task

Row = dict[str, Any]


def judge(task: Task, curate: Curate, row: Mapping[str, Any], choices: Sequence[str] | None, gold: str | None) -> Row:
    """One generation with `rationale` and `label` read from its text, and `reason` and `detail` when it is
    rejected, else None.

    Args:
        row: of `schema.GENERATIONS`.
        choices: the row's choices, for kind row_choice.
        gold: to compare with, or None where there is none or where it must not be looked at (the test
            split is scored, not filtered).
    """
    if row["error"] is not None:
        return _rejected(row, None, None, Reason.ENGINE_ERROR, row["error"])
    reply = read_reply(task, row["text"], choices)
    if reply.reason is not None:
        if row["finish_reason"] == "length":
            return _rejected(row, reply.rationale, None, Reason.TRUNCATED, "cut at max_tokens before its answer")
        return _rejected(row, reply.rationale, None, reply.reason, reply.detail)
    if len(reply.rationale.split()) < curate.min_words:
        return _rejected(row, reply.rationale, reply.label, Reason.TOO_SHORT, f"under {curate.min_words} words")
    if curate.on_disagree == "drop" and gold is not None and not task.same(reply.label, gold):
        return _rejected(row, reply.rationale, reply.label, Reason.DISAGREES_WITH_GOLD, f"gold is {gold!r}")
    return {**row, "rationale": reply.rationale, "label": reply.label, "reason": None, "detail": None}


def _rejected(row: Mapping[str, Any], rationale: str | None, label: str | None, reason: Reason, detail: str) -> Row:
    return {**row, "rationale": rationale, "label": label, "reason": str(reason), "detail": detail}
