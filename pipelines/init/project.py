"""A data file → `<name>.yaml` and `<name>-recipe.yaml`, from `task.yaml.j2` and `recipe.yaml.j2`; and what to do next.

Everything that is written is a proposal, for a person to correct; the comments in the files say how.
"""

import math
import re
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipelines.console import say, show_table
from pipelines.draw import position_in_unit
from pipelines.errors import UserError
from pipelines.init.columns import Sample, look_at, one_line
from pipelines.init.proposal import Proposal, choose_inputs, find_label, propose_answer
from pipelines.replies import read_reply
from pipelines.tasks import Task
from pipelines.tasks.task import CHOICES_FIELD, Kind

VALIDATION_SHARE = 0.1
EXEMPLARS = 8
EXEMPLAR_CHARACTERS = 1_500  # all exemplars stand in every prompt
LONG_INPUT = 4_000  # characters: about the 1,024 tokens that a student reads by default
FEW_ROWS = 10  # of a label; twice as many of validation
ALIKE = 0.5  # Jaccard similarity of the words of two exemplars
CPU_TEACHER, GPU_TEACHER = "Qwen/Qwen3-1.7B", "Qwen/Qwen3-32B"
_CHATS = re.compile(r"(?i)instruct|chat|[-_]it\b|qwen3(?!.*base)")  # names of models that are tuned to converse

Propose = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class Project:
    """What was written, and what was proposed in it."""

    task: str  # path of the task file
    recipe: str  # path of the recipe
    kind: Kind
    label: str | None  # None: the file has no gold labels
    inputs: tuple[str, ...]
    exemplars: int
    notes: tuple[str, ...]  # what a person should know, one sentence each


@dataclass(frozen=True)
class Candidate:
    """A row of the sample as the task reads it."""

    number: int
    input: dict[str, Any]  # the columns that an exemplar holds
    text: str
    label: str | None
    row_id: str


def init_project(
    file: str,
    input_columns: Sequence[str] = (),
    label_column: str | None = None,
    folder: str = ".",
    name: str | None = None,
    labels: Sequence[str] = (),
    teacher: str | None = None,
    propose: Propose | None = None,
    gpus: int = 0,
    force: bool = False,
) -> Project:
    """Write a task file and a recipe for a data file; print what was found and what comes next.

    Args:
        file: CSV, TSV, JSON, JSON lines or Parquet; a path or any fsspec URI.
        input_columns: what teacher and student read; else the columns of text.
        label_column: where the gold label is; else found by name or by values.
        folder: where both files are written; made if it is not there.
        name: of task and recipe; else made of the file's.
        labels: the closed set of answers, where the file does not show all of it; of a column that holds 0, 1, 2 …
            their names, in order. A file without a column of these labels is unlabelled.
        teacher: its model, for the recipe.
        propose: maps prompts to the teacher's texts, one each, in order: they become the exemplars' rationales.
            Without it a person is asked to write them.
        gpus: of one engine of the teacher; 0 makes a recipe for a machine without any.
        force: overwrite the two files.

    Raises:
        UserError: the file has no rows or no header; label or inputs can't be told, or don't exist; a column's name
            can't stand in a template; a row is one that a run would refuse; one of the two files is there already.
    """
    name = name or _name_of(file)
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
        raise UserError(f"--name {name}: a name is made of letters, digits, _ and -")
    task_path, recipe_path = Path(folder) / f"{name}.yaml", Path(folder) / f"{name}-recipe.yaml"
    for path in (task_path, recipe_path):
        if path.exists() and not force:
            raise UserError(f"{path}: is there already; --force overwrites it, --name gives another")

    sample = look_at(file)
    label, why_label = find_label(sample, label_column, labels)
    proposal = propose_answer(sample, label, labels)
    inputs, left_out = choose_inputs(sample, label, proposal, input_columns)
    task = draft_task(name, inputs, label, proposal)
    candidates = read_candidates(task, sample)
    chosen = choose_exemplars(task, candidates)
    rationales = propose_rationales(task, chosen, propose) if propose else [""] * len(chosen)
    notes = [*proposal.notes, *_notes(sample, task, proposal, candidates)]

    model = teacher or (GPU_TEACHER if gpus else CPU_TEACHER)
    facts = {
        "file": file,
        "task": task,
        "task_path": str(task_path),
        "recipe_path": str(recipe_path),
        "labelled": label is not None,
        "why": proposal.why,
        "counts": proposal.counts,
        "left_out": left_out,
        "exemplars": list(zip(chosen, rationales, strict=True)),
        "unshown": ", ".join(known for known in task.answer.labels if known not in {c.label for c in chosen}),
        "blank": candidates[0].input,
        "share": VALIDATION_SHARE,
        "teacher": model,
        "chats": bool(_CHATS.search(model)),
        "trial": not (teacher or gpus),
        "gpus": gpus,
    }
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path, template in ((task_path, "task.yaml.j2"), (recipe_path, "recipe.yaml.j2")):
            path.write_text(_environment().get_template(template).render(facts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--folder {folder}: nothing can be written there: {error.strerror}") from error

    _show_columns(sample, label, left_out)
    say(f"label: {'none' if label is None else one_line(label)}, {why_label}")
    say(f"kind of answer: {task.answer.kind}; {proposal.why}")
    for note in notes:
        say(f"note: {note}")
    say(f"written: {task_path}, {recipe_path}")
    _show_next_steps(task_path, recipe_path, rationales, labelled=label is not None)
    return Project(str(task_path), str(recipe_path), task.answer.kind, label, tuple(inputs), len(chosen), tuple(notes))


# the task


def draft_task(name: str, inputs: Sequence[str], label: str | None, proposal: Proposal) -> Task:
    """The task without exemplars."""
    choices, marks = proposal.answer.choices, proposal.marks
    read = [column for column in inputs if column != choices and column not in marks]
    alone = len(read) == 1
    lines = [f"{{{read[0]}}}"] if alone else [f"{_heading(column)}: {{{column}}}" for column in read]
    if choices or marks:
        lines.append("Answer Choices:")
    lines += [f"{{{CHOICES_FIELD}}}"] if choices else [f"({mark}) {{{column}}}" for column, mark in marks.items()]
    called = _heading(label or "label").lower()
    instruction = {
        "choice": f"Say which {called} fits: {', '.join(proposal.answer.labels)}.",
        "row_choice": "Answer each question with one of its choices.",
        "expression": "Answer each question with a number, or with the arithmetic expression that gives it.",
        "text": f"Give the {called} of each input.",
    }
    return Task(
        name=name,
        input="\n".join(lines),
        label=label or "label",
        answer=proposal.answer,
        instruction=instruction[proposal.answer.kind],
        prompt=(f"{_heading(read[0])}: " if alone else "") + "{input}\nReasoning:",
    )


def read_candidates(task: Task, sample: Sample) -> list[Candidate]:
    """The rows of a sample as the task reads them.

    Raises:
        UserError: a run would refuse the row: it lacks a column, its input is empty, or its label is not the task's.
    """
    candidates = []
    for number, row in sample.rows:
        where = f"{sample.file}, row {number}"
        lacking = [column for column in task.fields if row.get(column) is None]
        if lacking:
            raise UserError(
                f"{where}: no {one_line(lacking[0])!r}; fill it in, leave the row out, or name other --input"
            )
        try:
            choices = task.row_choices(row)
            text, label = task.render(row), task.gold(row.get(task.label), choices)
        except ValueError as error:
            raise UserError(f"{where}: {error}; correct it, or give another --label or other --labels") from error
        if not text:
            raise UserError(f"{where}: the input is empty; fill it in, or leave the row out")
        shown: dict[str, Any] = {column: format(row[column]) for column in task.fields}
        if task.answer.choices:
            shown[task.answer.choices] = choices
        candidates.append(Candidate(number, shown, text, label, task.row_id(text)))
    return candidates


def choose_exemplars(task: Task, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Up to eight labelled rows, in turn from each label (or place of the choice, or form of the expression), the most
    frequent first; those of middle length before others, and none that a run holds out. Of a label that has one
    already, only rows that are unlike all others."""
    fit = [c for c in candidates if c.label is not None and not _held_out(c)]
    short = [c for c in fit if len(c.text) <= EXEMPLAR_CHARACTERS] or sorted(fit, key=lambda c: len(c.text))[:1]
    if not short:
        return []
    middle = statistics.median(len(c.text) for c in short)
    groups: dict[str, list[Candidate]] = {}
    for candidate in sorted(short, key=lambda c: (abs(math.log(len(c.text) / middle)), c.number)):
        groups.setdefault(_group(task, candidate), []).append(candidate)
    turns: list[tuple[Candidate | None, Iterator[Candidate]]]
    turns = [(group[0], iter(group)) for group in sorted(groups.values(), key=len, reverse=True)]
    chosen: list[Candidate] = []
    while turns and len(chosen) < EXEMPLARS:
        otherwise, group = turns.pop(0)
        found = next((c for c in group if not any(_alike(c, other) for other in chosen)), otherwise)
        if found:
            chosen.append(found)
            turns.append((None, group))
    return chosen


def _held_out(candidate: Candidate) -> bool:
    """Whether the dataset stage takes the row for validation."""
    return position_in_unit(candidate.row_id) < VALIDATION_SHARE


def _group(task: Task, candidate: Candidate) -> str:
    label = candidate.label or ""
    match task.answer.kind:
        case "choice":
            return label
        case "row_choice":
            return str(candidate.input[task.answer.choices or ""].index(label))
        case "expression":
            return "".join(sorted(set(label) & set("+-*/")))
        case "text":
            return ""


def _alike(left: Candidate, right: Candidate) -> bool:
    ours, theirs = (set(re.findall(r"\w+", str([*c.input.values()]).casefold())) for c in (left, right))
    return len(ours & theirs) > ALIKE * len(ours | theirs) or left.row_id == right.row_id


def propose_rationales(task: Task, exemplars: Sequence[Candidate], propose: Propose) -> list[str]:
    """The teacher's reasons for the labels of exemplars, each one paragraph without the answer's sentence; empty where
    it gave none."""
    prompts = [
        f"{task.instruction}\n\n{exemplar.text}\n\nThe answer is {exemplar.label}. Explain in one to three sentences "
        "why, from the text alone.\nExplanation:"
        for exemplar in exemplars
    ]
    choices = [exemplar.input.get(task.answer.choices or "") for exemplar in exemplars]
    said = [read_reply(task, text, given) for text, given in zip(propose(prompts), choices, strict=True)]
    return [" ".join(reply.rationale.split("\n\n")[0].split()) for reply in said]


# what a person reads


def _notes(sample: Sample, task: Task, proposal: Proposal, candidates: Sequence[Candidate]) -> list[str]:
    labelled = [c for c in candidates if c.label is not None]
    held_out = sum(map(_held_out, labelled))
    rare = [f"{one_line(known)} ({number})" for known, number in proposal.counts.items() if number < FEW_ROWS]
    length = statistics.median(len(c.text) for c in candidates)
    notes = []
    if not sample.whole:
        notes.append(f"only the first {sample.read:,} rows were looked at; a label that comes later has to be added")
    if all(sample.columns[name].kind in ("number", "category") for name in task.fields):
        notes.append("no column is text, so numbers are put into words; for tables other models are better than T5")
    if rare:
        notes.append(
            f"labels of fewer than {FEW_ROWS} rows are hard to learn; merge them or find more: {', '.join(rare)}"
        )
    if task.answer.kind == "text":
        notes.append("an answer of kind text is right when it has the same words, so it suits short answers only")
    if length > LONG_INPUT:
        notes.append(f"half of the inputs have {length:,.0f} characters or more; a student cuts at max_input_tokens")
    if not labelled:
        return notes
    if len(labelled) < len(candidates):
        notes.append(
            f"{len(candidates) - len(labelled):,} of {len(candidates):,} rows have no label; the teacher gives one"
        )
    if sample.whole and held_out < 2 * FEW_ROWS:
        notes.append(f"validation will have {held_out} rows, too few to tell students apart; label more")
    return notes


def _show_columns(sample: Sample, label: str | None, left_out: Mapping[str, str]) -> None:
    rows = []
    for name, column in sample.columns.items():
        use = "label" if name == label else f"left out: {left_out[name]}" if name in left_out else "input"
        examples = " | ".join(one_line(text, 24) for text in column.examples)
        rows.append([one_line(name), column.kind, f"{column.distinct:,}", examples, use])
    of = f" of the first {sample.read:,}" if sample.read > len(sample.rows) else ""
    title = f"{sample.file}: {len(sample.rows):,}{of} rows"
    show_table(title, ["column", "kind", "distinct", "examples", "use"], rows, numbers=False)


def _show_next_steps(task: Path, recipe: Path, rationales: Sequence[str], labelled: bool) -> None:
    todo = ""
    if not rationales:
        todo = ", and write exemplars"
    elif missing := rationales.count(""):
        todo = f", and write a rationale in place of each TODO, {missing} in all"
    else:
        todo = f", and correct the {len(rationales)} rationales that the model proposed"
    command = f"distill {'run' if labelled else 'rationales'} {shlex.quote(str(recipe))}"
    steps = [
        f"read {task}{todo}",
        f"distill preview {shlex.quote(str(recipe))}    # what the teacher will be asked",
        f"{command} --set source.limit=200    # on a few rows",
        command,
    ]
    say("next steps:")
    for number, step in enumerate(steps, 1):
        say(f"  {number}. {step}")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"yaml": _yaml, "scalar": _scalar, "one_line": one_line}
    return environment


class _Dumper(yaml.SafeDumper):
    """Writes lines of text as lines, and a list on one line."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    if set(text) & set("\x85\u2028\u2029"):
        style = '"'  # in another style PyYAML reads them back as other line ends
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, values: list[str]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def _yaml(**content: Any) -> str:
    """`key: value` as YAML, for a template."""
    return yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=110).removesuffix("\n")


def _scalar(text: str) -> str:
    """A text on one line, in quotes where YAML would take it for something else."""
    return yaml.dump(text, Dumper=_Dumper, allow_unicode=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def _heading(column: str) -> str:
    line = one_line(column.replace("_", " "))
    return line[:1].upper() + line[1:]


def _name_of(file: str) -> str:
    """A task's name from the file's, or from that of the nearest folder which says more than `train` or `data`."""
    path = Path(file)
    for part in (path.name.split(".")[0], *(folder.name for folder in path.absolute().parents)):
        slug = re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")
        slug = re.sub(r"(?:^|-)(?:train|training|valid|validation|dev|test|data)$", "", slug)
        if slug:
            return slug
    return "task"
