"""A teacher's raw text as a rationale and a label, or a reason why not."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from pipelines.prompts import Style, stop_strings
from pipelines.schema import Reason
from pipelines.tasks import Task
from pipelines.tasks.expression import ExpressionError, leading_expression
from pipelines.tasks.task import LETTERS, normalise_answer

Thinking = Literal["strip", "rationale"]

_FEWEST_WORDS = 3  # fewer, besides those of the answer, explain nothing
# how a text speaks of an answer that it was told
_TOLD = re.compile(
    r"\b(?:right|correct|given|stated|provided|expected|gold) (?:answer|label)\b"
    r"|\b(?:answer|label) (?:that )?(?:is |was |we are |we were )?(?:given|stated|provided|told)\b"
    r"|\btold (?:that )?the (?:answer|label)\b"
    r"|\bthe hint\b"
)


@dataclass(frozen=True)
class Reply:
    """What was read from a teacher's text. Without a label, `reason` says why."""

    rationale: str
    label: str | None
    reason: Reason | None = None
    detail: str = ""


def read_reply(
    task: Task,
    text: str,
    choices: Sequence[str] | None = None,
    thinking: Thinking = "strip",
    style: Style = "completion",
) -> Reply:
    """A teacher's raw text as rationale and label.

    Text after the next exemplar's opening is cut first. The label must follow the task's answer
    sentence; without that sentence the text is `unparsable`, with another label `label_not_in_set`.

    Args:
        choices: the row's, for kind row_choice.
        thinking: a reasoning model's `<think>…</think>` before its reply is left out, or is the rationale.
            The label is always read from what follows it; a text that is cut within it has none.
        style: of the prompt that the text answers, which says where the text ends.
    """
    thought, _, said = text.rpartition("</think>")  # the opening may be part of the prompt, and so not be here
    if said.lstrip().startswith("<think>"):
        return Reply("", None, Reason.UNPARSABLE, "the text ends within its thinking part")
    reply = _read_said(task, cut_run_on(task, said, style), choices)
    thought = re.sub("</?think>", "", thought).strip()
    return replace(reply, rationale=thought) if thought and thinking == "rationale" else reply


def cut_run_on(task: Task, text: str, style: Style = "completion") -> str:
    """The text up to the first stop string."""
    for stop in stop_strings(task, style):
        if not stop.strip():
            text = text.lstrip()  # an empty line ends a text, but not before it began
        text = text.split(stop)[0]
    return text.strip()


def cites_hint(task: Task, rationale: str, label: str) -> bool:
    """Whether a rationale that was asked for with the gold label told (`Task.hint`) gives that as its reason:
    it repeats the hint, or speaks of the right, the correct or the given answer.

    Only for such rationales: without a hint, `the correct answer` is the teacher's own.
    """
    said = " ".join(_words(rationale))
    hint = " ".join(_words(task.hint.format(label=label)))
    repeated = hint != " ".join(_words(label)) and f" {hint} " in f" {said} "
    return repeated or bool(_TOLD.search(said))


def only_answer(task: Task, rationale: str, label: str) -> bool:
    """Whether a rationale, of either kind, is little more than its answer: it shares words with the label or
    the answer sentence, and has fewer than three others."""
    words = _words(rationale)
    answer = {*_words(label), *_words(" ".join(task.answer.around))}
    others = [word for word in words if word not in answer]
    return len(others) < min(_FEWEST_WORDS, len(words))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", normalise_answer(text))


def _read_said(task: Task, text: str, choices: Sequence[str] | None) -> Reply:
    """Rationale and label of a text that is cut at both ends."""
    lead = task.answer.lead
    pattern = re.escape(lead).replace(r"\ ", r"\s+")
    found = re.search(rf"(?i)(?:^|(?<=\W)){pattern}\s*", text)
    if not found:
        return Reply(text, None, Reason.UNPARSABLE, f"no {lead!r} in the text")
    rationale, answer = text[: found.start()].strip(), text[found.end() :]
    label = _read_label(task, answer, choices)
    if label is None:
        reason = Reason.UNPARSABLE if task.answer.kind in ("expression", "text") else Reason.LABEL_NOT_IN_SET
        return Reply(rationale, None, reason, f"the answer reads {answer.strip()[:60]!r}")
    return Reply(rationale, label)


def _read_label(task: Task, answer: str, choices: Sequence[str] | None) -> str | None:
    """The label at the start of what follows the answer sentence's opening."""
    match task.answer.kind:
        case "choice":
            return _leading_label(answer, task.answer.labels)
        case "row_choice":
            return _read_choice(answer, choices or ())
        case "expression":
            try:
                return leading_expression(answer)
            except ExpressionError:
                return None
        case "text":
            line = answer.split("\n")[0].strip()
            return task.canonical(line.removesuffix(task.answer.around[1].strip()))


def _read_choice(answer: str, choices: Sequence[str]) -> str | None:
    """`(c) the choice's text` or either half of it alone, but neither two halves that contradict each other
    nor `(a) one or (b) another`."""
    letter = re.match(r"\W*([a-zA-Z])\)", answer)
    if not letter:
        return _leading_label(answer, choices)
    sentence = re.split(r"[.\n]", answer)[0]
    if len(set(re.findall(r"\(([a-z])\)", sentence.lower()))) > 1:
        return None
    index = LETTERS.index(letter.group(1).lower())
    chosen = choices[index] if index < len(choices) else None
    named = _leading_label(answer[letter.end() :], choices)
    if chosen and named and chosen != named:
        return None
    return named or chosen


def _leading_label(text: str, labels: Sequence[str]) -> str | None:
    """The longest label that the text begins with, as a whole word."""
    text = normalise_answer(text)
    signs = re.match(r"\W*", text)
    begins = range(signs.end() + 1 if signs else 1)  # a label may begin with a sign itself
    for wanted, label in _longest_first(tuple(labels)):
        for begin in begins:
            if text.startswith(wanted, begin) and not re.match(r"\w", text[begin + len(wanted) :][:1]):
                return label
    return None


@lru_cache(maxsize=1024)
def _longest_first(labels: tuple[str, ...]) -> list[tuple[str, str]]:
    """Labels as they are compared and as they are spelt."""
    return [(normalise_answer(label), label) for label in sorted(labels, key=len, reverse=True)]
