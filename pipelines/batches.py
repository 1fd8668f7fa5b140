"""Which rows a step learns from: a pure function of the rows, the seed and the step.

So the data is the same for any number of workers, and after any restart.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from pipelines.draw import Rationale, TrainRow

_WINDOW = 32  # batches whose rows are sorted together: enough that few are of mixed length, few enough to mix rows


@dataclass(frozen=True, eq=False)
class Schedule:
    """The rows of every step. Epochs follow each other without a gap, so a batch may span two."""

    rows: Sequence[TrainRow]
    seed: int
    batch_size: int
    by_length: bool = False  # rows of like length share a batch
    rationales: Literal["first", "draw", "per_teacher"] = "first"

    def step(self, step: int) -> list[TrainRow]:
        """The rows of one step (from 0), each with those of its rationales that it teaches now."""
        places = (
            divmod(place, len(self.rows)) for place in range(step * self.batch_size, (step + 1) * self.batch_size)
        )
        return [self._teach(self.rows[_order(self, epoch)[at]], epoch) for epoch, at in places]

    def _teach(self, row: TrainRow, epoch: int) -> TrainRow:
        taught = row.rationales[:1]
        if self.rationales == "draw" and row.rationales:
            taught = (random.Random(f"{self.seed}/{epoch}/{row.row_id}").choice(row.rationales),)
        elif self.rationales == "per_teacher":
            first: dict[str, Rationale] = {}
            for rationale in row.rationales:
                first.setdefault(rationale.teacher, rationale)
            taught = tuple(first.values())
        return replace(row, rationales=taught)


@lru_cache(maxsize=2)  # a batch may span two epochs
def _order(schedule: Schedule, epoch: int) -> tuple[int, ...]:
    """The order in which an epoch sees its rows: each once, another order each epoch."""
    rows, size = schedule.rows, schedule.batch_size
    dice = random.Random(f"{schedule.seed}/{epoch}")
    order = list(range(len(rows)))
    dice.shuffle(order)
    if not schedule.by_length:
        return tuple(order)
    begun = -epoch * len(order) % size  # so many rows fill up the batch that the last epoch began
    batches = [order[:begun]]
    for at in range(begun, len(order), _WINDOW * size):
        window = sorted(order[at : at + _WINDOW * size], key=lambda row: _length(rows[row]))
        made = [window[i : i + size] for i in range(0, len(window), size)]
        rest = [made.pop()] if len(made[-1]) < size else []  # the epoch's last, which the next one fills up
        dice.shuffle(made)
        batches += made + rest
    return tuple(row for batch in batches for row in batch)


def deal(rows: Sequence[TrainRow], parts: int) -> list[list[TrainRow]]:
    """The rows of a step in as many parts of equal size, each with about as much text: longest first, to and fro."""
    ordered = sorted(rows, key=_length, reverse=True)
    rounds = [ordered[at : at + parts] for at in range(0, len(ordered), parts)]
    turned = [part if number % 2 == 0 else part[::-1] for number, part in enumerate(rounds)]
    return [list(part) for part in zip(*turned, strict=True)]


def _length(row: TrainRow) -> int:
    """Characters, which grow as tokens do; the encoder reads the input once a task."""
    texts = [r.text for r in row.rationales[:1]]
    return len(row.input) * (1 + len(texts)) + sum(map(len, texts))
