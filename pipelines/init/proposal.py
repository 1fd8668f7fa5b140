"""What a sample's columns are for: the label, the kind of answer, the inputs. Every choice comes with its reason."""

import difflib
import itertools
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipelines.errors import UserError
from pipelines.init.columns import (
    Column,
    ColumnKind,
    Sample,
    is_arithmetic,
    is_empty,
    label_text,
    one_line,
    recurs,
    snake,
    words,
)
from pipelines.tasks import Answer
from pipelines.tasks.sources import Row, read_rows
from pipelines.tasks.task import LETTERS, normalise_answer

# The likelier names first; where a number has its name beside it, the name is the better label.
LABEL_NAMES = (
    "label_text label_name gold_label gold label labels answer target class category queue intent sentiment topic "
    "rating stars score species spam equation output response completion summary"
).split()
_LABEL_WORDS = {"label", "gold", "target", "class", "category", "queue", "intent", "sentiment", "topic", "rating"}
_EXPLANATION_NAMES = {"reason", "reasoning", "justification", "chain_of_thought", "cot"}
_EXPLANATION_WORDS = {"explanation", "rationale"}
_CHOICE_NAME = re.compile(r"(?:choice|option|opt|ending|alternative|candidate|answer)_?([a-z]|\d+)|([a-h])")
_PLACE = re.compile(r"[A-Za-z]|\d\d?")  # of a choice among the choices
_CODE = re.compile(r"-?\d+|True|False")  # a label that may stand for a name
_MOST = 0.9  # share of rows

_LEFT_OUT: dict[ColumnKind, str] = {
    "category": "few values",
    "number": "numbers",
    "date": "a date",
    "id": "an id",
    "list": "lists",
    "object": "objects, which have to become columns of text first",
    "constant": "always the same",
    "empty": "empty",
}


@dataclass(frozen=True)
class Proposal:
    """How answers are read, and why."""

    answer: Answer
    why: str
    counts: Counter[str] = field(default_factory=Counter)  # kind choice: label -> rows of those read
    marks: dict[str, str] = field(default_factory=dict)  # where each choice has a column: column -> letter or number
    notes: tuple[str, ...] = ()


def find_label(sample: Sample, given: str | None, labels: Sequence[str]) -> tuple[str | None, str]:
    """The column of the gold label, None where `labels` are given and no column holds them; and how it was found.

    Raises:
        UserError: no such column; none or several could be it.
    """
    if given is not None:
        return _existing(sample, given, "--label"), "as given"
    able = [
        column
        for column in sample.columns.values()
        if column.kind not in ("id", "date", "empty") and not _CHOICE_NAME.fullmatch(snake(column.name))
    ]
    by_name = {snake(column.name): column.name for column in reversed(able)}
    named = [by_name[name] for name in LABEL_NAMES if name in by_name]
    if labels:
        held = next((c.name for c in able if _holds(sample, c.name, labels, coded=c.name in named)), None)
        return held, "as it holds the given labels" if held else "as no column holds the given labels"
    if named:
        return named[0], "by its name"
    few = [c for c in able if c.kind == "category" or (c.kind == "number" and recurs(sample.count(c.name)))]
    likely = [c for c in few if words(c.name) & _LABEL_WORDS] or few
    if len(likely) == 1:
        return likely[0].name, "by its name and values" if len(few) > 1 else "the only column with few values"
    if likely:
        names = ", ".join(one_line(c.name) for c in likely)
        raise UserError(f"{sample.file}: each of {names} could be the label; say which with --label")
    raise UserError(
        f"{sample.file}: none of its columns ({', '.join(map(one_line, sample.columns))}) looks like a label; name it "
        "with --label, or, where there is none, give the answers with --labels a,b,c, and the teacher labels the rows"
    )


def _holds(sample: Sample, column: str, labels: Sequence[str], coded: bool) -> bool:
    """Whether a column holds nothing but these labels, or the numbers that stand for them."""
    values = set(sample.count(column))
    known = set(map(normalise_answer, labels))
    return bool(values) and (set(map(normalise_answer, values)) <= known or (coded and bool(_codes(values, labels))))


def propose_answer(sample: Sample, label: str | None, labels: Sequence[str] = ()) -> Proposal:
    """The kind of answer, from the values of the label's column.

    Raises:
        UserError: the label is empty, always the same, or not of a form that a task's answer can have.
    """
    if label is None:
        return Proposal(_choice(labels), "the labels were given")
    where = f"{sample.file}: column {one_line(label)!r}"
    if sample.columns[label].kind in ("list", "object"):
        raise UserError(f"{where} holds lists or objects, but an answer is one text; name another with --label")
    counts = sample.count(label)
    if not counts:
        raise UserError(f"{where} is empty in every row looked at; name another with --label, or give --labels a,b,c")
    if labels:
        return _propose_given(sample, label, labels, _codes(counts, labels))
    if len(counts) == 1:
        raise UserError(
            f"{where} holds one label, {one_line(next(iter(counts)))!r}, in every row looked at, and a task needs two; "
            "name another column with --label, or give all labels with --labels a,b,c"
        )
    if (choices := _list_of_choices(sample, label)) is not None:
        answer = Answer(kind="row_choice", choices=choices, sentence="So the answer is ({letter}) {label}.")
        return Proposal(answer, f"the label is one of the row's {one_line(choices)}")
    marks = _columns_of_choices(sample, label)
    marked = bool(marks) and set(counts) <= set(marks.values())
    if marked or recurs(counts):
        return _propose_choice(sample, label, marks, marked)
    differ = f"{len(counts):,} of {counts.total():,} labels differ"
    if all(map(is_arithmetic, counts)):
        return Proposal(Answer(kind="expression", sentence="The answer is {label}."), f"all are arithmetic, {differ}")
    note = (
        f"the label is the text of {', '.join(map(one_line, marks))}; were these one column with a list, the kind "
        "could be row_choice, which takes no other answer"
    )
    return Proposal(Answer(kind="text"), differ, marks=marks, notes=(note,) if marks else ())


def _propose_given(sample: Sample, label: str, labels: Sequence[str], codes: dict[str, str]) -> Proposal:
    answer = _choice(labels).model_copy(update={"values": codes})
    counts, notes = _count_labels(sample, label, answer)
    if codes:
        meaning = ", ".join(f"{code} for {known}" for code, known in codes.items())
        notes.append(f"{one_line(label)!r} is taken to say {meaning}: the order in which the labels were given")
    return Proposal(answer, "the labels were given", counts, notes=tuple(notes))


def _propose_choice(sample: Sample, label: str, marks: dict[str, str], marked: bool) -> Proposal:
    counts, notes = _count_labels(sample, label, _choice(marks.values()) if marked else None)
    answer = _choice(counts)
    codes = {known: known for known in answer.labels if _CODE.fullmatch(known)}
    if codes and not marked:
        notes.append(
            f"labels such as {next(iter(codes))!r} say little to a teacher; if they stand for names, give these in "
            "order with --labels a,b,c"
        )
    why = f"{len(counts)} labels recur, {counts.total() / len(counts):,.0f} times each on average"
    return Proposal(answer.model_copy(update={"values": codes}), why, counts, marks if marked else {}, tuple(notes))


def _choice(labels: Iterable[str]) -> Answer:
    known = tuple(dict.fromkeys(" ".join(label.split()) for label in labels))
    if len({normalise_answer(label) for label in known} - {""}) < max(2, len(known)):
        raise UserError(f"labels {', '.join(known)}: a task needs two or more, which differ in more than capitals")
    return Answer(kind="choice", labels=known)


def _codes(values: Iterable[str], labels: Sequence[str]) -> dict[str, str]:
    """Where the data holds 0, 1, 2 … or 1, 2, 3 …: which of the given labels each stands for, by their order."""
    found = set(values)
    for first in (0, 1):
        codes = [str(number) for number in range(first, first + len(labels))]
        if found == set(codes):
            return dict(zip(codes, labels, strict=True))
    return {}


def _count_labels(sample: Sample, label: str, known: Answer | None) -> tuple[Counter[str], list[str]]:
    """Rows of each label, over all rows read, in the order of `known`, or of numbers, or the most frequent first;
    and a note on each that differs from another in no more than capitals, which a task takes for the same."""
    rows: Iterable[Row] = (row for _, row in sample.rows)
    if sample.read > len(sample.rows):  # a rare label may not be in the sample
        rows = itertools.islice(read_rows(sample.file), sample.read)
    texts = Counter(label_text(value) for row in rows if not is_empty(value := row.get(label)))
    spelling = {normalise_answer(text): text for text in (known.labels if known else ())}
    counts = Counter(dict.fromkeys(spelling.values(), 0))
    notes = []
    for text, number in texts.most_common():
        meant = known.values.get(text, text) if known else text
        first = spelling.setdefault(normalise_answer(meant), meant)
        counts[first] += number
        if first != meant:
            notes.append(f"label {one_line(meant)!r} of {number:,} rows counts as {one_line(first)!r}")
    if not known and all(re.fullmatch(r"-?\d+", text) for text in counts):
        counts = Counter({text: counts[text] for text in sorted(counts, key=int)})
    return counts, notes


def _list_of_choices(sample: Sample, label: str) -> str | None:
    """The column of lists that holds most rows' label.

    Raises:
        UserError: the label is the place of a choice in the list, not the choice.
    """
    rows = sample.filled(label)
    for column in (c.name for c in sample.columns.values() if c.kind == "list"):
        inside = sum(
            normalise_answer(label_text(row[label])) in [normalise_answer(str(c)) for c in row.get(column) or ()]
            for row in rows
        )
        if inside > _MOST * len(rows):
            return column
        if words(column) & {"choices", "options", "endings"} and all(map(_PLACE.fullmatch, sample.count(label))):
            raise UserError(
                f"{sample.file}: {one_line(label)!r} says which of the {one_line(column)} is right by its place; a "
                "task needs its words: add a column that holds them, and name that one with --label"
            )
    return None


def _columns_of_choices(sample: Sample, label: str) -> dict[str, str]:
    """Where each choice has a column, such as `choice_a` or `ending0`: column -> its letter or number as a label has
    it, or, where labels are the words of a choice, column -> a letter. Elsewhere nothing."""
    matches = {name: _CHOICE_NAME.fullmatch(snake(name)) for name in sample.columns if name != label}
    suffixes = {name: match.group(1) or match.group(2) for name, match in matches.items() if match}
    if len(suffixes) < 2:
        return {}
    labels = set(sample.count(label))
    for spelled in (str.lower, str.upper):
        if labels <= set(map(spelled, suffixes.values())):
            return {name: spelled(suffix) for name, suffix in suffixes.items()}
    rows = sample.filled(label)
    inside = sum(row[label] in [row.get(name) for name in suffixes] for row in rows)
    return dict(zip(suffixes, LETTERS, strict=False)) if inside > _MOST * len(rows) else {}


def choose_inputs(
    sample: Sample, label: str | None, proposal: Proposal, given: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The columns that teacher and student read, the choices last; and why each other column is left out.

    Raises:
        UserError: a given column does not exist or can't be read; there is nothing to read; a column's name can't
            stand in a template.
    """
    choices = [proposal.answer.choices] if proposal.answer.choices else list(proposal.marks)
    rest = [column for column in sample.columns.values() if column.name not in (label, *choices)]
    reasons = {column.name: why for column in rest if (why := _why_left_out(column, len(sample.rows)))}
    if given:
        inputs = [_existing(sample, name, "--input") for name in given if name not in choices]
        for name in inputs:
            if name == label:
                raise UserError(f"--input {name}: this column is the label")
            if sample.columns[name].kind in ("list", "object"):
                raise UserError(f"--input {name}: {sample.file} holds lists or objects there, and an input is text")
    else:
        texts = [column for column in rest if column.kind == "text" and not _explains(column.name)]
        whole = [column for column in texts if column.name not in reasons]
        numbers = [column for column in rest if column.kind in ("number", "category") and not choices]
        inputs = [c.name for c in whole or sorted(texts, key=lambda c: -c.filled)[:1] or numbers]
    if not inputs and not choices:
        raise UserError(f"{sample.file}: besides the label no column is of use as an input; name one with --input")
    for name in [*inputs, *proposal.marks]:
        if not _fits_template(name):
            raise UserError(
                f"{sample.file}: column {one_line(name)!r} can't stand in a template, where . [ ! : {{ }} and names "
                f"made of digits have a meaning; rename it, e.g. to {_plain(name)!r}"
            )
    left_out = {c.name: reasons.get(c.name, "not named") for c in rest if c.name not in inputs}
    return [*inputs, *choices], left_out


def _why_left_out(column: Column, rows: int) -> str:
    """Why a column is not proposed as an input; empty where it is."""
    if column.kind != "text":
        return _LEFT_OUT[column.kind]
    if _explains(column.name):
        return "it explains the label, and a student has nothing like it to read"
    if column.gaps or column.filled < rows / 2:
        return f"empty in {rows - column.filled:,} of {rows:,} rows"
    return ""


def _explains(name: str) -> bool:
    return snake(name) in _EXPLANATION_NAMES or bool(words(name) & _EXPLANATION_WORDS)


def _fits_template(name: str) -> bool:
    """Whether `{name}` in a template stands for the column of this name, and nothing else."""
    template = "{" + name + "}"
    try:
        parts = [*string.Formatter().parse(template)]
        return parts == [("", name, "", None)] and template.format_map({name: "x"}) == "x"
    except (KeyError, IndexError, ValueError, AttributeError):
        return False


def _plain(name: str) -> str:
    """A column's name that a template can hold."""
    plain = re.sub(r"\W+", "_", name).strip("_")
    return plain if plain and not plain.isdigit() else f"column_{plain}".strip("_")


def _existing(sample: Sample, name: str, option: str) -> str:
    if name not in sample.columns:
        near = difflib.get_close_matches(name, sample.columns, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(one_line, sample.columns))}"
        raise UserError(f"{option} {name}: {sample.file} has no such column; {hint}")
    return name
