"""A task is one YAML file: input template, kind of answer, exemplars.

Kinds of answer:
    choice      one of a closed set, the same for every row (`labels`)
    row_choice  one of the choices that the row itself brings (`choices` names the column)
    expression  arithmetic, equal when its value is equal
    text        free text, equal after normalising
"""

import hashlib
import math
import string
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import UserError, explain_invalid
from pipelines.tasks.expression import ExpressionError, evaluate

SHIPPED = Path(__file__).parent
Kind = Literal["choice", "row_choice", "expression", "text"]
Length = Literal["short", "medium", "full"]
CHOICES_FIELD = "choices"  # `{choices}` in a template: the row's choices, one lettered line each


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Answer(_Frozen):
    """What an answer is, and the sentence by which a teacher states it."""

    kind: Kind
    labels: tuple[str, ...] = ()
    choices: str | None = Field(default=None, description="column of the row's choices, for row_choice")
    values: dict[str, str] = Field(default={}, description="gold value in the data -> label, e.g. 0: entailment")
    sentence: str = "So the answer is {label}."

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "choice" and len(set(self.labels)) < 2:
            raise ValueError("kind choice needs `labels`, two or more different ones")
        if self.kind != "choice" and self.labels:
            raise ValueError(f"kind {self.kind} takes no `labels`")
        if (self.kind == "row_choice") != (self.choices is not None):
            raise ValueError("`choices` names the column of the choices; it goes with kind row_choice and no other")
        _must_format("sentence", self.sentence, label="\0", letter="a")
        unknown = set(self.values.values()) - set(self.labels)
        if self.kind == "choice" and unknown:
            raise ValueError(f"`values` maps to {sorted(unknown)}, not among `labels`")
        return self

    @property
    def around(self) -> tuple[str, str]:
        """What the sentence says before the label, or before its letter, and after both."""
        before, *_, after = self.sentence.format(label="\0", letter="\0").split("\0")
        return before, after

    @property
    def lead(self) -> str:
        """The words by which the sentence is known in a text; empty when it begins with the label."""
        return self.around[0].strip().removesuffix("(").strip()


class Rationale(_Frozen):
    """An exemplar's reasoning at three lengths; in a task file, a string is the full one alone."""

    short: str | None
    medium: str | None
    full: str

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        return value if isinstance(value, Mapping | Rationale) else {"short": None, "medium": None, "full": value}


class Exemplar(_Frozen):
    """One worked example of the prompt: the columns that `input` needs, a rationale, a label."""

    input: dict[str, Any]
    rationale: Rationale
    label: str


class Task(_Frozen):
    """A task file. See `pipelines/tasks/*.yaml` for five of them."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    description: str = ""
    input: str = Field(description="what teacher and student read; {column} is a column of the data")
    label: str = Field(default="label", description="column of the gold label; rows without it are unlabelled")
    answer: Answer
    instruction: str = Field(default="", description="first thing in every prompt")
    prompt: str = Field(default="Q: {input}\nA:", description="how one input is put to the teacher")
    exemplars: tuple[Exemplar, ...] = ()
    hint: str = Field(
        default="(The right answer is {label}.)", description="tells the gold label, where a rationale is asked for it"
    )
    stop: tuple[str, ...] = Field(default=(), description="ends of a teacher's answer, besides the next exemplar")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _must_format("prompt", self.prompt, input="\0")
        _must_format("hint", self.hint, label="\0")
        if not all(self.stop):
            raise ValueError("`stop` must not hold an empty string")
        if not self.fields:
            raise ValueError("`input` must hold at least one {column}")
        for number, exemplar in enumerate(self.exemplars, 1):
            lacking = [f for f in self.fields if f not in exemplar.input]
            if lacking:
                raise ValueError(f"exemplar {number} lacks {', '.join(lacking)}, which `input` asks for")
            try:
                self.gold(exemplar.label, self.row_choices(exemplar.input))
            except ValueError as error:
                raise ValueError(f"exemplar {number}: {error}") from error
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns of the data that `input` and the choices need."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.input) if name]
        if self.answer.choices:
            names = [n for n in names if n != CHOICES_FIELD or n == self.answer.choices] + [self.answer.choices]
        return tuple(dict.fromkeys(names))

    def row_choices(self, row: Mapping[str, Any]) -> list[str] | None:
        """The choices of a row of kind row_choice, stripped; None for the other kinds.

        Raises:
            ValueError: the column does not hold a list of two or more strings.
        """
        if self.answer.choices is None:
            return None
        choices = row[self.answer.choices]
        if not isinstance(choices, Sequence) or isinstance(choices, str) or not 2 <= len(choices) <= len(LETTERS):
            wanted = f"a list of two or more choices, at most {len(LETTERS)}"
            raise ValueError(f"{self.answer.choices!r} must be {wanted}, not {choices!r}")
        return [str(c).strip() for c in choices]

    def render(self, row: Mapping[str, Any]) -> str:
        """A row as the input text that teacher and student read."""
        values = {name: row[name] for name in self.fields}
        choices = self.row_choices(row)
        if choices is not None:
            values[CHOICES_FIELD] = "\n".join(f"({letter}) {c}" for letter, c in zip(LETTERS, choices, strict=False))
        return self.input.format_map(values).strip()

    def gold(self, value: object, choices: Sequence[str] | None = None) -> str | None:
        """The gold label in its canonical form; None when the row has none.

        Raises:
            ValueError: the value is no label of this task.
        """
        if value is None or (isinstance(value, float) and math.isnan(value)) or str(value).strip() == "":
            return None
        if isinstance(value, float) and value.is_integer() and self.answer.values:
            value = int(value)  # an integer column with gaps is read as floats
        text = self.answer.values.get(str(value), str(value).strip())
        label = self.canonical(text, choices)
        if label is None:
            raise ValueError(f"label {text!r} is not {self._expected(choices)}")
        return label

    def canonical(self, text: str, choices: Sequence[str] | None = None) -> str | None:
        """A label as this task spells it, or None when the text is no label of it."""
        kind = self.answer.kind
        if kind in ("choice", "row_choice"):
            known = self.answer.labels if kind == "choice" else choices or ()
            wanted = normalise_answer(text)
            return next((label for label in known if normalise_answer(label) == wanted), None)
        if kind == "expression":
            try:
                evaluate(text)
            except ExpressionError:
                return None
        return text.strip() or None

    def same(self, left: str | None, right: str | None) -> bool:
        """Whether two labels are the same answer. None, an answer that could not be read, equals nothing."""
        if left is None or right is None:
            return False
        if self.answer.kind == "expression":
            try:
                return evaluate(left) == evaluate(right)
            except ExpressionError:
                return False
        return normalise_answer(left) == normalise_answer(right)

    def rationales(self, length: Length = "full") -> list[str]:
        """The exemplars' rationales at one length, in their order.

        Raises:
            UserError: an exemplar has its rationale in full alone.
        """
        texts: list[str | None] = [getattr(exemplar.rationale, length) for exemplar in self.exemplars]
        for number, text in enumerate(texts, 1):
            if text is None:
                raise UserError(
                    f"task {self.name}, exemplar {number}: no {length} rationale; give it as "
                    "`rationale: {short: …, medium: …, full: …}`"
                )
        return [text for text in texts if text is not None]

    def row_id(self, text: str) -> str:
        """The id of an input: a hash of the task's name and the input with its white space normalised."""
        normal = " ".join(unicodedata.normalize("NFC", text).split())
        return hashlib.sha256(f"{self.name}\0{normal}".encode()).hexdigest()[:24]

    def _expected(self, choices: Sequence[str] | None) -> str:
        if self.answer.kind == "expression":
            return "an arithmetic expression"
        return f"one of {', '.join(choices or self.answer.labels)}"


LETTERS = string.ascii_lowercase


def _must_format(name: str, template: str, **values: str) -> None:
    """Check that a template takes these fields and no other, and holds the first of them.

    Raises:
        ValueError: it does not.
    """
    wanted = next(iter(values))
    try:
        made = template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"`{name}` can't be filled in ({error}); it takes {{{wanted}}}, {{{{ is a brace") from error
    if values[wanted] not in made:
        raise ValueError(f"`{name}` must hold {{{wanted}}}")


def normalise_answer(text: str) -> str:
    """Text as it is compared: NFKC, lower case, white space single, no final stop."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .")


def load_task(name_or_path: str) -> Task:
    """A task by the name of a shipped one, or from the user's own file.

    Raises:
        UserError: no such task, or the file is not a task.
    """
    shipped = sorted(p.stem for p in SHIPPED.glob("*.yaml"))
    path = SHIPPED / f"{name_or_path}.yaml" if name_or_path in shipped else Path(name_or_path)
    if not path.is_file():
        raise UserError(f"task {name_or_path!r} is neither a file nor one of {', '.join(shipped)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a task file is a mapping with name, input, answer, …")
    try:
        return Task.model_validate(content)
    except ValidationError as error:
        raise UserError(explain_invalid(str(path), Task, error)) from error
