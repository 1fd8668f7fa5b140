"""How fast labels are served: the predictor against the usual way, and the whole HTTP path against plain FastAPI.

Weights are random: times mean something, answers don't. All sides get the same texts and take turns. First by shape
(T5 v1.1 small, T5 base, the quickstart's student), labels of a closed set:

    hf           Hugging Face `generate`, greedy, fp32, as many new tokens as the longest label has
    ctranslate2  the same with CTranslate2 in int8, where that is installed; it is no dependency of ours
    onnx         the same with ONNX Runtime in int8, if `--onnx-python` says which Python can export for it
    ours         the predictor: the labels scored, in bf16 where the processor has it, otherwise in int8
    ours fp32
    … open       expressions of 16 tokens instead, which are written token by token

Then over HTTP, with T5 v1.1 small; the first two are up together, then the other two:

    plain     FastAPI and uvicorn around the same predictor, with a batcher of a few lines
    direct    our application, its one replica listening itself (`distill serve`)
    proxied   the same behind Ray Serve's proxy (`distill serve --proxy`)
    haproxy   the same behind the HAProxy that Ray Serve starts; it listens on 0.0.0.0, whatever host is asked for
    … noop    each of them with a model that says the same of everything, at once
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).parents[1])  # in this folder, `serve` would be this file

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.serve_http import GOALS, PROXIES, time_servers  # noqa: E402
from benchmarks.serve_models import OPEN, closed_sides, make_bundle, open_sides, teacher_rate, time_sides  # noqa: E402
from pipelines.predictor import can_run  # noqa: E402

MUST = {
    "hf_b1": 4.0,
    "hf_b8": 4.0,
    "hf_b32": 4.5,
    "int8_b1": 0.95,
    "int8_b8": 0.95,
    "int8_b32": 0.95,
    "open_answers": 2.0,
    "http_c16": 0.90,
    "http_c64": 0.85,
    "http_noop_c64": 0.6,
    "http_c64_of_predictor": 0.85,
}
SIZES = (1, 8, 32)
CONNECTIONS = (1, 16, 64)
Medians = dict[tuple[str, int], float]


def compare(
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of one turn over HTTP.")] = 8.0,
    threads: Annotated[int, typer.Option(min=1, help="Of the model.")] = 1,
    onnx_python: Annotated[
        str | None, typer.Option(metavar="PATH", help="A Python with what benchmarks/onnx_export.py needs.")
    ] = None,
    core_hour: Annotated[float, typer.Option(min=0, help="Price of a core for an hour.")] = 0.04,
    quick: Annotated[bool, typer.Option("--quick", help="One turn; no T5 base, no proxies, no teacher.")] = False,
) -> None:
    """Run all sides in turn; print tables, then one JSON object."""
    rounds, seconds = (1, 2.0) if quick else (rounds, seconds)
    console, cores = Console(), os.cpu_count() or 1
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, "small")
        texts = make_bundle(folder, "small")
        small = _medians(time_sides(closed_sides(folder, threads, onnx_python), texts, SIZES, rounds))
        small |= _time_open(Path(made, "open"), 1 if quick else min(rounds, 3))
        _show(console, f"T5 v1.1 small, {threads} threads: ms a batch", SIZES, small)
        wanted = [("quickstart", threads)] if quick else [("quickstart", threads), ("base", threads), ("small", cores)]
        others = {}
        for shape, count in wanted:
            name = f"{shape}, {count} threads"
            others[name] = _time_other(Path(made, name), shape, count, onnx_python, 1 if quick else min(rounds, 3))
            _show(console, f"{name}: ms a batch", SIZES, others[name])
        torch.set_num_threads(threads)
        rates: Medians = {}
        for kinds in (GOALS,) if quick else (GOALS, PROXIES):
            noops = [f"{kind} noop" for kind in kinds]
            rates |= _medians(time_servers(kinds, folder, texts, CONNECTIONS, rounds, seconds, threads))
            rates |= _medians(time_servers(noops, folder, texts, CONNECTIONS[-1:], rounds, seconds, threads))
    _show(console, "requests/s at connections", CONNECTIONS, rates)
    ratios = _ratios(small) | _http_ratios(rates, small)
    missing = sorted(MUST.keys() - ratios.keys())
    result = {
        "benchmark": "serve",
        "ratios": _rounded(ratios),
        "must": MUST,
        "met": not missing and all(ratios[name] >= least for name, least in MUST.items()),
        "not_measured": missing,
        "others": {name: _rounded(_ratios(times)) for name, times in others.items()},
        "threads": threads,
        "bf16": can_run("bf16"),
    }
    if not quick:
        student = 32_000 / others[f"quickstart, {threads} threads"]["ours", 32] / threads
        result["cost_per_1000"] = _costs(student, teacher_rate(200) / cores, core_hour)
    print(json.dumps(result))


def _time_open(folder: Path, rounds: int) -> Medians:
    texts = make_bundle(folder, "small", OPEN)
    return _medians(time_sides(open_sides(folder), texts, SIZES, rounds))


def _time_other(folder: Path, shape: str, threads: int, onnx_python: str | None, rounds: int) -> Medians:
    texts = make_bundle(folder, shape)
    torch.set_num_threads(threads)
    return _medians(time_sides(closed_sides(folder, threads, onnx_python), texts, SIZES, rounds))


def _costs(student: float, teacher: float, core_hour: float) -> dict[str, float]:
    """What 1,000 answers cost, from answers that a core gives in a second."""
    student_cost, teacher_cost = (float(f"{1000 / rate / 3600 * core_hour:.3g}") for rate in (student, teacher))
    return {
        "core_hour": core_hour,
        "student": student_cost,
        "teacher": teacher_cost,
        "teacher_over_student": round(student / teacher, 1),
    }


def _ratios(times: Medians) -> dict[str, float]:
    """Ours over the others, by rows of a batch."""
    ratios = {f"hf_b{n}": times["hf", n] / times["ours", n] for n in SIZES}
    if int8 := [side for side in ("ctranslate2", "onnx") if (side, 1) in times]:
        ratios |= {f"int8_b{n}": min(times[side, n] for side in int8) / times["ours", n] for n in SIZES}
    if ("hf open", 1) in times:
        by_size = {f"open_answers_b{n}": times["hf open", n] / times["ours open", n] for n in SIZES}
        ratios |= {"open_answers": min(by_size.values()), **by_size}
    return ratios


def _http_ratios(rates: Medians, small: Medians) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for side in (*GOALS[1:], *PROXIES):
        if (side, 64) not in rates:
            continue
        suffix = "" if side == "direct" else f"_{side}"
        ratios |= {f"http_c{n}{suffix}": rates[side, n] / rates["plain", n] for n in CONNECTIONS[1:]}
        ratios[f"http_noop_c64{suffix}"] = rates[f"{side} noop", 64] / rates["plain noop", 64]
    ratios["http_c64_of_predictor"] = rates["direct", 64] / (32_000 / small["ours", 32])
    return ratios


def _medians(values: Mapping[tuple[str, int], Sequence[float]]) -> Medians:
    return {key: statistics.median(made) for key, made in values.items()}


def _rounded(ratios: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in ratios.items()}


def _show(console: Console, title: str, columns: Sequence[int], values: Medians) -> None:
    table = Table(title=title)
    for name in ("", *map(str, columns)):
        table.add_column(name, justify="right" if name else "left")
    for side in dict.fromkeys(side for side, _ in values):
        table.add_row(side, *(f"{values[side, n]:.1f}" if (side, n) in values else "" for n in columns))
    console.print(table)


if __name__ == "__main__":
    typer.run(compare)
