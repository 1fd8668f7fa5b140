"""`distill plan`: what asking the teacher will take, before it is paid.

A few rows are generated to see how fast the teacher writes and how much; their texts are kept, so they are
not paid for again.
"""

import heapq
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipelines.console import say, show_table
from pipelines.errors import UserError
from pipelines.examples import build_examples
from pipelines.lineage import ROWS, Lineage
from pipelines.meter import cost, gpu_hours
from pipelines.pending import Asking, keys_on_disk, make_keys, pending
from pipelines.prompts import chat_messages, completion_prompt
from pipelines.recipe import resolve
from pipelines.schema import EXAMPLES, GENERATIONS
from pipelines.teacher import ask

_TOKENISED = 1000


@dataclass(frozen=True)
class Estimate:
    """A figure with its range."""

    low: float
    value: float
    high: float

    def times(self, factor: float) -> "Estimate":
        return Estimate(self.low * factor, self.value * factor, self.high * factor)


def make_plan(line: Lineage, rows: int | None = None, rate: float | None = None) -> dict[str, Any]:
    """Estimate tokens, hours and money of the texts that are not there yet.

    Args:
        rows: how many to generate as a sample; by default two batches of the recipe's, at most a quarter of what
            is pending.
        rate: rows a second of one engine; then nothing is generated.

    Raises:
        UserError: the engine can't be asked, or the source or the teacher are at fault.
    """
    teacher = line.recipe.teacher
    if teacher.engine == "outputs":
        raise UserError("teacher.engine outputs costs nothing: the texts are there")
    build_examples(line)
    asking = Asking(line.generations, teacher, range(teacher.samples))
    left = list(_pending(line, asking))
    account: dict[str, Any] | None = None
    start = 0.0
    if rate is None and left:
        under_way = teacher.endpoint.concurrency if teacher.endpoint else teacher.batch_size
        sample = _some(left, rows or max(1, min(2 * under_way, len(left) // 4)))
        say(f"generating {len(sample):,} of {len(left):,} pending texts, to see how fast they come; they are kept")
        account = ask(line, Asking(line.generations, teacher, asking.samples, only=make_keys(sample)))
        left = list(_pending(line, asking))
    if account is not None:
        rate = (account["steady_rate"] or account["rows"] / account["seconds"]) / account["replicas"]
        start = account["seconds"] - account["engine_seconds"] / account["replicas"] + account["start_seconds"]
    return _estimate(line, left, rate, start, account)


def _estimate(
    line: Lineage, left: Sequence[tuple[str, int]], rate: float | None, start: float, account: dict[str, Any] | None
) -> dict[str, Any]:
    teacher, count = line.recipe.teacher, len(left)
    known = line.generations.dataset(ROWS, GENERATIONS).to_table(columns=["input_tokens", "output_tokens"])
    written = _mean(
        known["output_tokens"].drop_null().to_pylist(), Estimate(1, teacher.max_tokens / 2, teacher.max_tokens)
    )
    read = _mean(_input_tokens(line, left) or known["input_tokens"].drop_null().to_pylist(), Estimate(0, 0, 0))
    cached = account["cached_tokens"] / account["input_tokens"] if account and account["input_tokens"] else None
    engines = teacher.replicas[1] if teacher.engine == "vllm" else 1
    seconds = _spread(count / rate).times(1 / engines) if rate else Estimate(0, 0, 0)
    seconds = Estimate(*(start + value for value in (seconds.low, seconds.value, seconds.high))) if count else seconds
    tokens = {"input_tokens": read.times(count), "output_tokens": written.times(count)}
    money = {
        name: cost(
            teacher.price,
            {n: getattr(t, name) for n, t in tokens.items()} | {"engine_seconds": getattr(seconds, name) * engines},
        )
        for name in ("low", "value", "high")
    }
    hours = seconds.times(gpu_hours(teacher, engines))
    made = {
        "rows": count,
        **{name: vars(estimate) for name, estimate in tokens.items()},
        "cached_share": cached,
        "seconds": vars(seconds),
        "gpu_hours": vars(hours),
        "cost": money,
        "rows_per_second": rate,
        "sample": account,
    }
    _show(made, engines)
    return made


def _pending(line: Lineage, asking: Asking) -> Iterator[tuple[str, int]]:
    for _, texts in pending(line, asking, keys_on_disk(asking.artifact)):
        yield from zip(texts["row_id"].to_pylist(), texts["sample"].to_pylist(), strict=True)


def _some(left: Sequence[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    """A random choice: row ids are hashes, so the smallest are as good as any."""
    return heapq.nsmallest(count, left)


def _input_tokens(line: Lineage, left: Sequence[tuple[str, int]]) -> list[int]:
    """Lengths of some of the prompts, by the teacher's own tokenizer; none for an endpoint, whose tokenizer is
    not here."""
    teacher, task = line.recipe.teacher, line.task
    if teacher.engine == "openai" or not left:
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(teacher.model), revision=teacher.revision or "main")
    wanted = pc.field("row_id").isin([row_id for row_id, _ in _some(left, _TOKENISED)])
    texts = itertools.chain.from_iterable(
        line.examples.dataset(split, EXAMPLES).to_table(columns=["input"], filter=wanted)["input"].to_pylist()
        for split in line.asked
    )
    if teacher.prompt == "chat":
        return [
            len(
                tokenizer.apply_chat_template(
                    list(chat_messages(task, text, teacher.rationale_length)),
                    add_generation_prompt=True,
                    return_dict=True,
                    **teacher.chat_template_args,
                )["input_ids"]
            )
            for text in texts
        ]
    return [
        len(ids)
        for ids in tokenizer([completion_prompt(task, t, teacher.rationale_length) for t in texts])["input_ids"]
    ]


def _mean(values: Sequence[int], otherwise: Estimate) -> Estimate:
    """The mean with its 95 % interval (normal)."""
    if not values:
        return otherwise
    mean = statistics.fmean(values)
    error = 1.96 * float(np.std(values)) / len(values) ** 0.5
    return Estimate(mean - error, mean, mean + error)


def _spread(seconds: float) -> Estimate:
    """A rate seen for a short time on a machine that others may share."""
    return Estimate(seconds * 0.8, seconds, seconds * 1.25)


def _show(plan: dict[str, Any], engines: int) -> None:
    def row(name: str, estimate: dict[str, float], form: str) -> list[str]:
        return [name, *(format(estimate[key], form) for key in ("low", "value", "high"))]

    rows = [
        ["texts to write", "", f"{plan['rows']:,}", ""],
        row("input tokens", plan["input_tokens"], ",.0f"),
        row("output tokens", plan["output_tokens"], ",.0f"),
        row(f"seconds, {engines} engine{'s' * (engines > 1)}", plan["seconds"], ",.0f"),
        row("GPU hours", plan["gpu_hours"], ",.3f"),
        row("cost", plan["cost"], ",.2f"),
    ]
    if plan["cached_share"] is not None:
        rows.insert(2, ["  of them from the prefix cache", "", f"{plan['cached_share']:.1%}", ""])
    if plan["rows_per_second"]:
        rows.insert(4, ["rows a second of one engine", "", f"{plan['rows_per_second']:,.2f}", ""])
    show_table("Plan: what is still to be asked", ["", "low", "estimate", "high"], rows)
