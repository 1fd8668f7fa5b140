"""The user's mistakes, as one clear sentence each."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


class UserError(Exception):
    """Something the user can put right: one sentence that names the file, key or row, and what to do.

    The command line prints the sentence and exits with 2; no traceback.
    """


def explain_invalid(where: str, model: type[BaseModel], error: ValidationError) -> str:
    """The first problem that pydantic found in a file, as one sentence; an unknown key comes with the
    nearest valid name."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = ".".join(str(part) for part in first["loc"])
    more = f" (1 of {len(problems)} problems)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        names = _field_names(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(names)}"
        return f"{where}: unknown key {key!r}; {hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] in ("missing", "value_error") else f", not {_short(first['input'])}"
    return f"{where}: {key + ': ' if key else ''}{message[0].lower() + message[1:]}{given}{more}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _field_names(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The fields of the (nested) model that a path of keys leads to."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # an index into a list
        model = _model_in(field.annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model within an annotation such as `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m), None)
