"""What a person sees: one console, which every stage writes to."""

from collections.abc import Iterable
from typing import TypeVar

from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(highlight=False)


def say(text: str) -> None:
    """A line of progress."""
    console.print(text, markup=False, soft_wrap=True)


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
    table = Table(title=Text(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and numbers else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
