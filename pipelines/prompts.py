"""Exemplars and an input as a prompt, and the form that the teacher's text must have."""

import hashlib
import json
import re
import string
from collections.abc import Sequence
from typing import Literal

from pipelines.errors import UserError
from pipelines.tasks import Task
from pipelines.tasks.task import LETTERS, Length

Style = Literal["completion", "chat"]


def completion_prompt(task: Task, text: str, length: Length = "full", hint: str | None = None) -> str:
    """The few-shot prompt for a base model: instruction, exemplars, then the input, which comes last so
    that all prompts share their prefix.

    Args:
        length: of the exemplars' rationales.
        hint: the gold label, told after the input; then every exemplar's is told, too.

    Raises:
        UserError: the exemplars have no rationales of this length.
    """
    return prompt_head(task, length, hint is not None) + _asked(task, text, hint)


def chat_messages(
    task: Task, text: str, length: Length = "full", hint: str | None = None
) -> tuple[dict[str, str], ...]:
    """The same for a chat model, as `role` and `content`: the instruction is the system's, each exemplar a turn of
    the user (the input alone: roles take the place of `Task.prompt`) and one of the model, the input the last turn.

    Raises:
        UserError: the exemplars have no rationales of this length.
    """
    turns = [("system", task.instruction.strip())] if task.instruction else []
    for exemplar, rationale in zip(task.exemplars, task.rationales(length), strict=True):
        told = None if hint is None else exemplar.label
        answer = completion(task, rationale, exemplar.label, task.row_choices(exemplar.input))
        turns += [("user", _with_hint(task, task.render(exemplar.input), told)), ("assistant", answer.strip())]
    turns.append(("user", _with_hint(task, text, hint)))
    return tuple({"role": role, "content": content} for role, content in turns)


def prompt_head(task: Task, length: Length = "full", hinted: bool = False) -> str:
    """The part of the completion prompt that is the same for every input."""
    parts = [task.instruction.strip()] if task.instruction else []
    for exemplar, rationale in zip(task.exemplars, task.rationales(length), strict=True):
        asked = _asked(task, task.render(exemplar.input), exemplar.label if hinted else None)
        parts.append(asked + completion(task, rationale, exemplar.label, task.row_choices(exemplar.input)))
    return "".join(part + "\n\n" for part in parts)


def completion(task: Task, rationale: str, label: str, choices: Sequence[str] | None = None) -> str:
    """What a teacher should write after the prompt: the rationale, then the answer sentence."""
    return f" {rationale.strip()}{_sentence(task, label, choices)}"


def stop_strings(task: Task, style: Style = "completion") -> list[str]:
    """Where a teacher's text runs on into a made-up next exemplar. A chat's reply ends by itself."""
    if style == "chat":
        return list(task.stop)
    shape = task.prompt.replace("{input}", task.input)
    opening = next(literal for literal, *_ in string.Formatter().parse(shape)).strip()
    return [*task.stop, "\n\n" + opening if opening else "\n\n"]


def prompt_hash(task: Task, style: Style = "completion", length: Length = "full", hinted: bool = False) -> str:
    """Identifies the shared part of the prompt and the form of the input in it."""
    if style == "chat":
        form = json.dumps(chat_messages(task, "", length, "" if hinted else None))
    else:
        form = f"{prompt_head(task, length, hinted)}\0{task.prompt}" + (f"\0{task.hint}" if hinted else "")
    return hashlib.sha256(form.encode()).hexdigest()[:16]


def answer_structure(task: Task, choices: Sequence[str] | None = None) -> str:
    """The form of an answer for vLLM's structured outputs, as a structural tag: one line of reasoning, then the
    answer sentence with a label of the closed set, which ends the text.

    The reasoning can't hold the sentence's own words, so the first answer is the only one and is in the set. A
    regular expression could say the same, but takes the engine milliseconds a token.

    Args:
        choices: the row's, which kind row_choice needs.

    Raises:
        UserError: the task's answers are no closed set.
    """
    match task.answer.kind:
        case "choice":
            labels: Sequence[str] = task.answer.labels
        case "row_choice" if choices:
            labels = choices
        case "row_choice":
            raise ValueError(f"task {task.name}: the form of a row's answer needs the row's choices")
        case kind:
            raise UserError(
                f"task {task.name}: teacher.constrain_answer needs a closed set of labels (kind choice or row_choice), "
                f"and its kind is {kind}; leave constrain_answer out"
            )
    sentences = "|".join(_escape(_sentence(task, label, choices)) for label in labels)
    reasoning = [{"type": "any_text", "excludes": ["\n", task.answer.lead]}] if task.answer.lead else []
    elements = [*reasoning, {"type": "regex", "pattern": sentences}]
    return json.dumps({"type": "structural_tag", "format": {"type": "sequence", "elements": elements}})


def _escape(text: str) -> str:
    """Text as a regular expression, within brackets too, with those escapes alone that every engine knows."""
    return re.sub(r"[][\\^$.|?*+(){}-]", r"\\\g<0>", text).replace("\n", r"\n")


def _asked(task: Task, text: str, hint: str | None) -> str:
    """One input in the form of the completion prompt."""
    return task.prompt.format(input=_with_hint(task, text, hint))


def _with_hint(task: Task, text: str, label: str | None) -> str:
    return text if label is None else f"{text}\n{task.hint.format(label=label)}"


def _sentence(task: Task, label: str, choices: Sequence[str] | None) -> str:
    """The answer sentence, with what stands between it and the rationale."""
    sentence = task.answer.sentence.format(label=label, letter=_letter(label, choices))
    return sentence if sentence.startswith("\n") else " " + sentence


def _letter(label: str, choices: Sequence[str] | None) -> str:
    return LETTERS[choices.index(label)] if choices and label in choices else ""
