"""Exemplars and an input as a prompt; a teacher's raw text as a rationale and a label, or a reason why not."""

import hashlib
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.schema import Reason
from pipelines.tasks import Task
from pipelines.tasks.expression import ExpressionError, leading_expression
from pipelines.tasks.task import LETTERS, normalise_answer


@dataclass(frozen=True)
class Reply:
    """What was read from a teacher's text. Without a label, `reason` says why."""

    rationale: str
    label: str | None
    reason: Reason | None = None
    detail: str = ""


def completion_prompt(task: Task, text: str) -> str:
    """The few-shot prompt for a base model: instruction, exemplars, then the input, which comes last so
    that all prompts share their prefix."""
    return prompt_head(task) + task.prompt.format(input=text)


def prompt_head(task: Task) -> str:
    """The part of the prompt that is the same for every input."""
    parts = [task.instruction.strip()] if task.instruction else []
    for exemplar in task.exemplars:
        text = task.render(exemplar.input)
        answer = completion(task, exemplar.rationale, exemplar.label, task.row_choices(exemplar.input))
        parts.append(task.prompt.format(input=text) + answer)
    return "".join(part + "\n\n" for part in parts)


def completion(task: Task, rationale: str, label: str, choices: Sequence[str] | None = None) -> str:
    """What a teacher should write after the prompt: the rationale, then the answer sentence."""
    sentence = task.answer.sentence.format(label=label, letter=_letter(label, choices))
    between = "" if sentence.startswith("\n") else " "
    return f" {rationale.strip()}{between}{sentence}"


def stop_strings(task: Task) -> list[str]:
    """Where a teacher's text runs on into a made-up next exemplar."""
    shape = task.prompt.replace("{input}", task.input)
    opening = next(literal for literal, *_ in string.Formatter().parse(shape)).strip()
    return [*task.stop, "\n\n" + opening if opening else "\n\n"]


def prompt_hash(task: Task) -> str:
    """Identifies the shared part of the prompt and the form of the input in it."""
    return hashlib.sha256(f"{prompt_head(task)}\0{task.prompt}".encode()).hexdigest()[:16]


def read_reply(task: Task, text: str, choices: Sequence[str] | None = None) -> Reply:
    """A teacher's raw text as rationale and label.

    Text after the next exemplar's opening is cut first. The label must follow the task's answer
    sentence; without that sentence the text is `unparsable`, with another label `label_not_in_set`.
    """
    text = cut_run_on(task, text)
    lead = _around_label(task)[0].strip().removesuffix("(").strip()
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


def cut_run_on(task: Task, text: str) -> str:
    """The text up to the first stop string."""
    for stop in stop_strings(task):
        if not stop.strip():
            text = text.lstrip()  # an empty line ends a text, but not before it began
        text = text.split(stop)[0]
    return text.strip()


def _around_label(task: Task) -> tuple[str, str]:
    """What the answer sentence says before the answer and after it."""
    before, *_, after = task.answer.sentence.format(label="\0", letter="\0").split("\0")
    return before, after


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
            return task.canonical(line.removesuffix(_around_label(task)[1].strip()))


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
    for label in sorted(labels, key=len, reverse=True):
        if re.match(rf"\W*{re.escape(normalise_answer(label))}(?!\w)", text):
            return label
    return None


def _letter(label: str, choices: Sequence[str] | None) -> str:
    return LETTERS[choices.index(label)] if choices and label in choices else ""
