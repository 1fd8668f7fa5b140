"""Do a million rows cost as much a row, and as much memory, as ten thousand?

Made-up rows go from their files to a dataset with the engine `outputs`, by the commands that a user runs, each in a
process of its own, whose peak memory the system tells. What starting up costs, imports above all, is measured with a
few rows, reported by itself, and taken off the time of the others.
"""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

MUST = {"seconds_per_row_growth": 1.3, "driver_memory_growth": 1.3}
COMMANDS = ("rationales", "dataset")
STAGES = ("examples", "generations", "rationales", "dataset")
LABELS = ("billing", "outage", "account", "other")
TASK = {
    "name": "tickets",
    "input": "{message}",
    "label": "queue",
    "answer": {"kind": "choice", "labels": list(LABELS)},
}
_FEW = 100
_MEMORY = "peak MiB of both"
SPLITS = {"test": 0.1, "train": 0.6, "unlabelled": 0.3}

_rng = random.Random(0)
_WORDS = ["".join(_rng.choices("abcdefghijklmnopqrstuvwxyz", k=_rng.randint(2, 10))) for _ in range(20_000)]


@dataclass(frozen=True)
class Measured:
    """What one number of rows took."""

    rows: int
    seconds: float  # of both commands
    cpu_seconds: float  # the same, without waiting for disks and other processes
    stages: dict[str, float]  # seconds of each, by its manifest; these leave out starting up
    memory: dict[str, float]  # command -> MiB, the most that its process held at once


def main(
    quick: Annotated[bool, typer.Option("--quick", help="5 and 50 thousand rows; ends within two minutes.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where to work, with 6 GB left; by default where the system keeps such.")
    ] = None,
) -> None:
    """Time and memory of `distill rationales` and `distill dataset`, from ten thousand to a million rows."""
    sizes = [5_000, 50_000] if quick else [10_000, 100_000, 1_000_000]
    # short runs stand before and after each long one, so that whatever else the machine does falls on all alike
    short = [_short(sizes[0], folder) for _ in range(2)]
    long = []
    for rows in sizes[1:]:
        long.append(_measure(rows, folder))
        short += [_short(sizes[0], folder) for _ in range(2)]
    start_up = sorted((start for start, _ in short), key=lambda start: start.seconds)[len(short) // 2]
    lines = [_medians([_figures(run, start) for start, run in short]), *(_figures(run, start_up) for run in long)]
    growth = {name: lines[-1][name] / first if (first := lines[0][name]) else math.nan for name in lines[0]}
    table = Table(title="From files to a dataset", title_justify="left")
    for name in ("rows", *(f"{rows:,}" for rows in sizes), "growth"):
        table.add_column(name, justify="left" if name == "rows" else "right")
    for name in lines[0]:
        table.add_row(name, *(f"{line[name]:,.0f}" for line in lines), f"{growth[name]:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"Starting up is left out of µs a row: {start_up.seconds:.1f} s ({start_up.cpu_seconds:.1f} s of CPU) for the "
        f"two commands, as measured with {_FEW} rows. It is part of the memory.",
        highlight=False,
    )
    ratios = {
        "seconds_per_row_growth": growth["µs a row"],
        "cpu_seconds_per_row_growth": growth["µs of CPU a row"],
        "driver_memory_growth": growth[_MEMORY],
    }
    result = {
        "benchmark": "scale",
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "must": MUST,
        "met": all(ratios[name] <= most for name, most in MUST.items()),
        "rows": sizes,
    }
    print(json.dumps(result))


def _figures(size: Measured, start_up: Measured) -> dict[str, float]:
    return {
        "seconds": size.seconds,
        "µs of CPU a row": 1e6 * (size.cpu_seconds - start_up.cpu_seconds) / size.rows,
        "µs a row": 1e6 * (size.seconds - start_up.seconds) / size.rows,
        **{f"  {stage}": 1e6 * (size.stages[stage] - start_up.stages[stage]) / size.rows for stage in STAGES},
        **{f"distill {command}, peak MiB": mib for command, mib in size.memory.items()},
        _MEMORY: max(size.memory.values()),
    }


def _medians(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(line[name] for line in figures) for name in figures[0]}


def _short(rows: int, folder: Path | None) -> tuple[Measured, Measured]:
    """(starting up alone, a small number of rows), one right after the other."""
    return _measure(_FEW, folder), _measure(rows, folder)


def _measure(rows: int, folder: Path | None) -> Measured:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        recipe = _write_source(Path(made), rows)
        seconds, cpu_seconds, memory = 0.0, 0.0, {}
        for command in COMMANDS:
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "pipelines", command, str(recipe)],
                env={**os.environ, "SQLITE_TMPDIR": made},
                stdout=subprocess.DEVNULL,
            )
            _, status, usage = os.wait4(process.pid, 0)  # of this child alone, unlike getrusage(RUSAGE_CHILDREN)
            seconds += time.perf_counter() - start
            cpu_seconds += usage.ru_utime + usage.ru_stime
            memory[command] = usage.ru_maxrss / 1024  # Linux counts in KiB
            if status:
                raise SystemExit(f"distill {command} failed on {rows:,} rows")
        manifests = (json.loads(path.read_text()) for path in Path(made).glob("runs/*/*/*/manifest.json"))
        stages = {manifest["stage"]: manifest["seconds"] for manifest in manifests}
        return Measured(rows, seconds, cpu_seconds, {stage: stages[stage] for stage in STAGES}, memory)


def _write_source(folder: Path, rows: int) -> Path:
    """A recipe, its task, its rows and the teacher's texts; always the same ones."""
    rng = random.Random(rows)
    for split, share in SPLITS.items():
        with open(folder / f"{split}.jsonl", "w") as source, open(folder / f"{split}-texts.jsonl", "w") as texts:
            for row, text in _rows(rng, round(rows * share)):
                source.write(json.dumps(row) + "\n")
                if text is not None:
                    texts.write(json.dumps({"message": row["message"], "text": text}) + "\n")
    recipe = {
        "name": "scale",
        "storage": str(folder / "runs"),
        "task": str(folder / "task.yaml"),
        "source": {"root": str(folder), **{split: f"{split}.jsonl" for split in SPLITS}},
        "teacher": {"engine": "outputs", "outputs": {split: f"{split}-texts.jsonl" for split in SPLITS}},
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def _rows(rng: random.Random, count: int) -> Iterator[tuple[dict[str, Any], str | None]]:
    """(row, what the teacher says of it). One input in a hundred stands twice, one nearly; a text in three is of no
    use, in one way or another."""
    lately: deque[str] = deque(["."], maxlen=1000)
    for _ in range(count):
        message, luck = _text(rng, 20, 80), rng.random()
        if luck < 0.01:
            message = rng.choice(lately)
        elif luck < 0.02:
            message = f"{rng.choice(lately)} {rng.choice(_WORDS)}"
        lately.append(message)
        gold = rng.choice(LABELS)
        said, label = _text(rng, 15, 60), gold if rng.random() < 0.8 else rng.choice(LABELS)
        text: str | None = f"{said} So the answer is {label}."
        luck = rng.random()
        if luck < 0.01:
            text = None
        elif luck < 0.06:
            text = said
        elif luck < 0.09:
            text = f"{said} So the answer is {rng.choice(_WORDS)}."
        elif luck < 0.11:
            text = f"So the answer is {label}."
        yield {"message": message, "queue": gold}, text


def _text(rng: random.Random, fewest: int, most: int) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(fewest, most))).capitalize() + "."


if __name__ == "__main__":
    typer.run(main)
