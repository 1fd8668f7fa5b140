"""Which rationales a student may learn from: pure functions that give each text a reason or none."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.prompts import Style
from pipelines.recipe import Curate
from pipelines.replies import cites_hint, only_answer, read_reply
from pipelines.schema import Reason
from pipelines.tasks import Task

Row = dict[str, Any]


def judge(
    task: Task,
    curate: Curate,
    row: Mapping[str, Any],
    choices: Sequence[str] | None,
    gold: str | None,
    hinted: bool = False,
    style: Style = "completion",
) -> Row:
    """One text with `rationale` and `label` read from it, and `reason` and `detail` when it is rejected, else None.

    Args:
        row: of `schema.GENERATIONS`.
        choices: the row's choices, for kind row_choice.
        gold: to compare with, or None where there is none or where it must not be looked at (the test
            split is scored, not filtered).
        hinted: the gold label was told, so it must come back, and with a reason of its own.
        style: of the prompt that the text answers.
    """
    made: Row = {**row, "rationale": None, "label": None, "agreement": None, "rationalized": hinted}

    def rejected(reason: Reason, detail: str) -> Row:
        return {**made, "reason": str(reason), "detail": detail}

    if row["error"] is not None:
        too_long = row["finish_reason"] == "too_long"
        return rejected(Reason.INPUT_TOO_LONG if too_long else Reason.ENGINE_ERROR, row["error"])
    reply = read_reply(task, row["text"], choices, curate.thinking, style)
    made |= {"rationale": reply.rationale, "label": reply.label}
    if reply.reason is not None:
        if row["finish_reason"] == "length":
            return rejected(Reason.TRUNCATED, "cut at max_tokens before its answer")
        return rejected(reply.reason, reply.detail)
    assert reply.label is not None  # it has a reason otherwise
    words = len(reply.rationale.split())
    if words < curate.min_words:
        return rejected(Reason.TOO_SHORT, f"under {curate.min_words} words")
    if curate.max_words is not None and words > curate.max_words:
        return rejected(Reason.TOO_LONG, f"over {curate.max_words} words")
    if hinted and cites_hint(task, reply.rationale, reply.label):
        return rejected(Reason.ANSWER_LEAK, "it gives the hint as its reason")
    if only_answer(task, reply.rationale, reply.label):
        return rejected(Reason.ANSWER_LEAK, "it says the answer and no reason")
    if gold is not None and (hinted or curate.on_disagree != "keep") and not task.same(reply.label, gold):
        return rejected(Reason.DISAGREES_WITH_GOLD, f"gold is {gold!r}")
    return {**made, "reason": None, "detail": None}


def vote(task: Task, samples: Sequence[Row], min_agreement: float, gold: bool) -> tuple[list[Row], str | None]:
    """The judged samples of one row with `agreement`, and the label that most of them say.

    Samples with another label are outvoted, and all are where too few agree. Where a gold label has judged them
    (`gold`), it stands above the vote. Of labels with equally many votes the first wins.
    """
    labels = [row["label"] for row in samples if row["label"] is not None and not row["rationalized"]]
    votes = {label: sum(task.same(label, other) for other in labels) for label in labels}
    winner = max(votes, key=lambda label: votes[label], default=None)
    made = []
    for row in samples:
        if row["rationalized"] or row["label"] is None:
            made.append(row)
            continue
        row = row | {"agreement": votes[row["label"]] / len(labels)}
        if not gold and row["reason"] is None:
            if not task.same(row["label"], winner):
                row |= {"reason": str(Reason.OUTVOTED), "detail": f"most samples say {winner!r}"}
            elif row["agreement"] < min_agreement:
                share = f"{row['agreement']:.0%} of {len(labels)} samples agree"
                row |= {"reason": str(Reason.OUTVOTED), "detail": f"only {share}"}
        made.append(row)
    return made, winner
