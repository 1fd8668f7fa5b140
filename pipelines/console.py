"""What a person sees: one console, which every stage writes to."""

from rich.console import Console
from rich.table import Table

console = Console(highlight=False)


def say(text: str) -> None:
    """A line of progress."""
    console.print(text, markup=False, soft_wrap=True)


def show_table(title: str, columns: list[str], rows: list[list[str]], numbers: bool = True) -> None:
    """A table; columns of numbers, all after the first, are right-aligned."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and numbers else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
