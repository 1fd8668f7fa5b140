"""`distill preview`: a few rows as the teacher reads them, what it wrote, and what was read from that."""

from typing import Any

from rich.table import Table
from rich.text import Text

from pipelines.console import console, say
from pipelines.curate import judge
from pipelines.examples import build_examples
from pipelines.lineage import ROWS, Lineage
from pipelines.pending import Asking, make_keys
from pipelines.prompts import chat_messages, prompt_head
from pipelines.rationales import build_generations
from pipelines.schema import EXAMPLES
from pipelines.teacher import ask


def preview(line: Lineage, rows: int) -> list[dict[str, Any]]:
    """Ask the teacher for the first rows, show prompt, text and reading side by side. Texts are kept, so a later run
    does not pay for them again.

    Returns:
        The rows of `schema.REJECTED`, with `input`; without a reason where accepted.

    Raises:
        UserError: the source or the teacher are at fault.
    """
    build_examples(line)
    split = line.asked[0]
    examples = line.examples.dataset(split, EXAMPLES).head(rows).to_pylist()
    if line.recipe.teacher.engine == "outputs":
        build_generations(line)
    else:
        asking = Asking(
            line.generations, line.recipe.teacher, range(1), only=make_keys([(e["row_id"], 0) for e in examples])
        )
        ask(line, asking)
    texts = {row["row_id"]: row for row in line.generations.iter_rows(ROWS) if row["sample"] == 0}
    made = []
    for example in examples:
        gold = example["label"] if split == "train" else None
        read = judge(
            line.task,
            line.recipe.curate,
            texts[example["row_id"]],
            example["choices"],
            gold,
            style=line.recipe.teacher.prompt,
        )
        made.append(read | {"input": example["input"]})
    _show(line, made)
    return made


def _show(line: Lineage, made: list[dict[str, Any]]) -> None:
    teacher = line.recipe.teacher
    if teacher.prompt == "chat":
        for message in chat_messages(line.task, "…", teacher.rationale_length)[:-1]:
            say(f"[{message['role']}] {message['content']}")
    else:
        say(prompt_head(line.task, teacher.rationale_length))
    table = Table(title="After which stands", title_justify="left", show_lines=True)
    for column in ("input", "the teacher's text", "read"):
        table.add_column(column, ratio=1, overflow="fold")
    for row in made:
        outcome = f"{row['reason']}: {row['detail']}" if row["reason"] else f"accepted: {row['label']}"
        cells = (row["input"], row["text"] or "-", f"{outcome}\n\n{row['rationale'] or ''}")
        table.add_row(*map(Text, cells))
    console.print(table)
