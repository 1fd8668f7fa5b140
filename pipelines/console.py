"""What a person sees: one console, which every stage writes to. With DISTILL_LOG_FORMAT=json, what a machine reads:
one JSON object a line, with the time, and the recipe, stage and key that it is about."""

import json
import os
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TypeVar

from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(highlight=False)


_about: ContextVar[dict[str, str] | None] = ContextVar("about", default=None)


def about(recipe: str, stage: str, key: str) -> None:
    """What this thread's lines are about from here on."""
    _about.set({"recipe": recipe, "stage": stage, "key": key})


def say(text: str, **about: str) -> None:
    """A line of progress; `about` replaces what the thread's lines are about."""
    if not _as_json(text.strip(), about):
        console.print(text, markup=False, soft_wrap=True)


def _as_json(message: str, more: dict[str, Any]) -> bool:
    """Write a line for machines, if such are wanted."""
    if os.environ.get("DISTILL_LOG_FORMAT") != "json":
        return False
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": now, **(_about.get() or {}), **more, "message": message}
    print(json.dumps(line, ensure_ascii=False), file=console.file, flush=True)
    return True


_T = TypeVar("_T")


def track(items: Iterable[_T], what: str, total: int) -> Iterable[_T]:
    """The items, with a progress bar on a terminal."""
    hidden = not console.is_terminal
    return progress.track(items, what, total, console=console, transient=True, disable=hidden)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 51 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def show_table(title: str, columns: list[str], rows: list[list[str]], numbers: bool = True) -> None:
    """A table; columns of numbers, all after the first, are right-aligned. Cells are plain text, not markup."""
    if _as_json(title, {"columns": columns, "rows": rows}):
        return
    table = Table(title=Text(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and numbers else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
