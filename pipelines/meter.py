"""What asking the teacher has come to: progress for people, metrics for Prometheus, limits for the budget.

Every run keeps an account under `spent/` of the artefact, so that a budget holds over all runs.
"""

import json
import math
import time
import uuid
from collections import Counter
from contextlib import AbstractContextManager
from typing import Any, Self

import pyarrow.compute as pc
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.artifact import Artifact
from pipelines.console import console, say
from pipelines.errors import UserError
from pipelines.lineage import ROWS
from pipelines.recipe import Price, Recipe, Teacher
from pipelines.schema import GENERATIONS

Row = dict[str, Any]
SPENT = "spent"
TOKENS = ("input_tokens", "cached_tokens", "output_tokens")
_SAVE_SECONDS = 2.0
_EARLY = 100  # texts after which a share of rejects says something
_EXAMPLES = 5
_KEPT = 1000  # rejected texts to choose the examples from; more would fill the memory of a long run


class Meter(AbstractContextManager["Meter"]):
    """Adds up the reports of one run. A context manager; leaving it saves the account.

    `allowed` is how many of the pending texts the budget's rows allow.
    """

    def __init__(self, recipe: Recipe, artifact: Artifact, pending: int, metrics: "Metrics | None" = None) -> None:
        self.recipe, self.artifact = recipe, artifact
        self.before = spent(artifact)
        self.paid_rows = self.before["rows"]
        most = recipe.budget.max_rows
        self.allowed = pending if most is None else max(0, min(pending, most - self.paid_rows))
        self.outcomes: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self._rejects: list[list[str]] = []
        self._replicas: dict[str, Row] = {}  # name -> its last report
        self._first: tuple[float, int] | None = None  # when the first batch was written, and how many texts
        self._last = 0.0
        self._began, self._saved, self._told = time.time(), 0.0, 0.0
        self._run = uuid.uuid4().hex[:12]
        self._progress = Progress(
            TextColumn("  asking the teacher"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rejected]:,} rejected · {task.fields[rate]:,.1f} rows/s ·"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=self.allowed, rejected=0, rate=0.0)
        self._metrics = metrics

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._save()

    def add(self, report: Row) -> None:
        """Take up the report of one batch.

        Raises:
            UserError: a limit of the budget is reached, too much is rejected, or a replica says that no one can go on.
        """
        if report["stop"]:
            raise UserError(report["stop"])
        outcomes = json.loads(report["outcomes"])
        self.outcomes.update(outcomes)
        self.tokens.update({name: report[name] for name in TOKENS})
        self.paid_rows += sum(outcomes.values())
        if len(self._rejects) < _KEPT:
            self._rejects += json.loads(report["rejects"])
        known = self._replicas.get(report["replica"], {"restarts": 0, "at": 0.0})
        self._replicas[report["replica"]] = max(known, report, key=lambda r: r["at"])
        self._first = min(self._first or (math.inf, 0), (report["at"], sum(outcomes.values())))
        self._last = max(self._last, report["at"])
        if self._metrics is not None:
            self._metrics.add(outcomes, report, max(0, report["restarts"] - known["restarts"]))
        self._show()
        if time.time() - self._saved > _SAVE_SECONDS:
            self._save()
        self._check_rejects()
        self._check_budget()

    @property
    def rows(self) -> int:
        return self.outcomes.total()

    @property
    def engine_seconds(self) -> float:
        """Over all engines, from the start of each to its last sign."""
        return float(sum(report["at"] - report["since"] for report in self._replicas.values()))

    @property
    def steady_rate(self) -> float | None:
        """Rows a second between the first batch's end and the last one's; None of a single batch."""
        first, of_first = self._first or (math.inf, 0)
        return (self.rows - of_first) / (self._last - first) if self._last > first else None

    @property
    def account(self) -> Row:
        """What this run has spent."""
        return {
            "rows": self.rows,
            **{name: self.tokens[name] for name in TOKENS},
            "seconds": round(time.time() - self._began, 3),
            "engine_seconds": round(self.engine_seconds, 3),
            "start_seconds": round(max(report["ready"] - report["since"] for report in self._replicas.values()), 3),
            "steady_rate": self.steady_rate,
            "replicas": len(self._replicas),
            "restarts": sum(report["restarts"] for report in self._replicas.values()),
        }

    def _save(self) -> None:
        if self.rows:
            self.artifact.write_text(f"{SPENT}/{self._run}.json", json.dumps(self.account))
        self._saved = time.time()

    def _show(self) -> None:
        rejected = self.rows - self.outcomes["accepted"]
        rate = self.rows / max(1e-9, time.time() - min(report["since"] for report in self._replicas.values()))
        self._progress.update(self._bar, completed=self.rows, rejected=rejected, rate=rate)
        if not console.is_terminal and time.time() - self._told > 30:
            self._told = time.time()
            say(f"  {self.rows:,} of {self.allowed:,} texts, {rejected:,} rejected, {rate:,.1f} rows/s")

    def _check_rejects(self) -> None:
        share, most = 1 - self.outcomes["accepted"] / self.rows, self.recipe.curate.max_reject_share
        if self.rows < _EARLY or share <= most:
            return
        say(f"  The most telling of {self.rows - self.outcomes['accepted']:,} rejected texts:")
        for reason, row_id, detail, text in telling(self._rejects):
            say(f"  - {row_id} {reason}: {detail}\n      {text.strip()[:300]!r}")
        raise UserError(
            f"{share:.0%} of the first {self.rows:,} texts are rejected, more than curate.max_reject_share {most:g}; "
            "look at `distill preview`, then mend the task's prompt, or raise the share, and run again"
        )

    def _check_budget(self) -> None:
        budget, teacher = self.recipe.budget, self.recipe.teacher
        tokens = sum(self.before[n] + self.tokens[n] for n in ("input_tokens", "output_tokens"))
        if budget.max_tokens is not None and tokens >= budget.max_tokens:
            raise UserError(f"budget.max_tokens is reached at {tokens:,} tokens; raise it and run again to go on")
        hours = gpu_hours(teacher, self.before["engine_seconds"] + self.engine_seconds)
        if budget.max_gpu_hours is not None and hours >= budget.max_gpu_hours:
            raise UserError(f"budget.max_gpu_hours is reached at {hours:.2f} hours; raise it and run again to go on")


def telling(rejects: list[list[str]]) -> list[list[str]]:
    """Five rejected texts: one of each reason, the most frequent first, then more of those."""
    order = [reason for reason, _ in Counter(r[0] for r in rejects).most_common()]
    by_reason = {reason: [r for r in rejects if r[0] == reason] for reason in order}
    rounds = [by_reason[reason][n] for n in range(_EXAMPLES) for reason in order if n < len(by_reason[reason])]
    return rounds[:_EXAMPLES]


def spent(artifact: Artifact) -> Row:
    """What all runs together have spent on an artefact's texts: rows and tokens by the texts themselves, times by
    the runs' accounts, which a kill makes short by two seconds at most."""
    total: Counter[str] = Counter(dict.fromkeys(("rows", *TOKENS, "seconds", "engine_seconds", "restarts"), 0))
    folder = artifact.path(SPENT)
    if artifact.fs.exists(folder):
        for path in (p for p in artifact.fs.find(folder) if p.endswith(".json")):
            account = json.loads(artifact.fs.cat_file(path))
            total.update({name: account[name] for name in ("seconds", "engine_seconds", "restarts")})
    for batch in artifact.scan(ROWS, GENERATIONS, list(TOKENS)):
        total.update({name: pc.sum(batch[name]).as_py() or 0 for name in TOKENS} | {"rows": len(batch)})
    return dict(total)


def gpu_hours(teacher: Teacher, engine_seconds: float) -> float:
    """GPU hours; an engine without GPU counts as one."""
    return engine_seconds / 3600 * max(1, teacher.gpus)


def cost(price: Price, account: Row) -> float:
    """Money, in the currency of the recipe's prices."""
    return float(
        price.replica_hour * account["engine_seconds"] / 3600
        + price.million_input_tokens * account["input_tokens"] / 1e6
        + price.million_output_tokens * account["output_tokens"] / 1e6
    )


class Metrics:
    """Counters at Ray's Prometheus endpoint, which puts `ray_` before their names."""

    def __init__(self, recipe: str) -> None:
        from ray.util.metrics import Counter as RayCounter

        self._rows = RayCounter("distill_rows", "Texts of the teacher, by what became of them", ("recipe", "outcome"))
        self._tokens = RayCounter("distill_tokens", "Tokens of the teacher", ("recipe", "kind"))
        self._restarts = RayCounter("distill_engine_restarts", "Engines that died and were started again", ("recipe",))
        for counter in (self._rows, self._tokens, self._restarts):
            counter.set_default_tags({"recipe": recipe})

    def add(self, outcomes: dict[str, int], report: Row, restarts: int) -> None:
        for outcome, count in outcomes.items():
            self._rows.inc(count, {"outcome": outcome})
        for kind in TOKENS:
            if report[kind]:
                self._tokens.inc(report[kind], {"kind": kind.removesuffix("_tokens")})
        if restarts:
            self._restarts.inc(restarts)
