"""How fast a student learns: our step, against the reference implementation's, stated again in plain torch.

All sides learn the same rows with the same weights to start from, and take turns; what counts is examples a second,
collating and the optimizer included. Rows are those of CommonsenseQA and SVAMP with their rationales, so inputs,
labels and rationales are as long as they really are; weights are random, and what is learnt does not matter.

    reference    two forward passes a step, one a task, each padded to the longest of a random batch, then plain AdamW
    exact        ours on the same batches: the same loss and gradients
    by length    ours with `batch_by_length`
    decoder      ours by length with `prefix: decoder`: another method, reported apart
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from pipelines.batches import Schedule, deal
from pipelines.dataset import build_dataset
from pipelines.draw import TrainRow, draw_rows
from pipelines.lineage import Lineage
from pipelines.rationales import build_rationales
from pipelines.recipe import Run, load_recipe, resolve
from pipelines.student import LABEL_PREFIX, RATIONALE_PREFIX, Collator, Objective

MUST = {
    "exact_fp32": 1.25,
    "bucketed_fp32": 1.5,
    "bucketed_bf16": 1.25,
    "default_vs_reference": 3.5,
    "two_workers": 1.7,
}
BATCH = 16
ROWS = 64  # of a turn; every side learns all of them
ALPHA, LEARNING_RATE = 0.5, 5e-5
REFERENCE = Path(os.environ.get("STEPDISTILL_REFERENCE", "../shared/data/reference"))
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Side = Callable[[int], None]  # learns so many batches


@app.callback(invoke_without_command=True)
def compare(
    context: typer.Context,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One turn of few rows, one set.")] = False,
    reference: Annotated[Path, typer.Option(help="Folder of the reference layout, with cqa/ and svamp/.")] = REFERENCE,
) -> None:
    """Run all sides in turn; print a table, then one JSON object."""
    if context.invoked_subcommand:
        return
    console = Console()
    sets = ("svamp",) if quick else ("cqa", "svamp")
    if not (reference / sets[0]).is_dir():
        raise SystemExit(f"{reference}: no folder {sets[0]} in it; give --reference the folder of the reference layout")
    speeds: dict[str, list[float]] = {}
    learnt = ROWS // 2 if quick else ROWS
    for name in sets:
        rows = _rows(reference, name)
        tokenizer = _tokenizer(rows)
        for shape in ("quickstart", "small"):
            sides = _sides(_model(shape, tokenizer), tokenizer, rows[:learnt])
            console.print(f"{name}: {_lengths(tokenizer, rows)}; {shape} shape")
            for learn in sides.values():
                learn(learnt // BATCH)  # memory is laid out, kernels are chosen
            for _ in range(1 if quick else rounds):
                for side, learn in sides.items():
                    learn(1)  # what the system took out of memory meanwhile comes back
                    start = time.perf_counter()
                    learn(learnt // BATCH)
                    speed = learnt / (time.perf_counter() - start)
                    speeds.setdefault(f"{shape} {name} {side}", []).append(speed)
                    console.print(f"  {side}: {speed:.1f} examples/s", highlight=False)
    two = _two_workers(1 if quick else 3)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    _show(console, medians, sets)

    def ratio(ours: str, theirs: str) -> float:
        """On the T5 v1.1 small shape; of several sets the least."""
        return min(medians[f"small {name} {ours}"] / medians[f"small {name} {theirs}"] for name in sets)

    ratios = {
        "exact_fp32": ratio("exact fp32", "reference fp32"),
        "bucketed_fp32": ratio("by length fp32", "reference fp32"),
        "bucketed_bf16": ratio("by length bf16", "reference bf16"),
        "default_vs_reference": ratio("exact bf16", "reference fp32"),
        "two_workers": two,
    }
    made = {
        "benchmark": "train",
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "must": MUST,
        "met": all(ratios[name] >= least for name, least in MUST.items()),
        "decoder_prefix": {p: round(ratio(f"decoder {p}", f"reference {p}"), 3) for p in ("fp32", "bf16")},
        "examples_per_second": speeds,
    }
    print(json.dumps(made))


def _show(console: Console, medians: dict[str, float], sets: Sequence[str]) -> None:
    table = Table(title="Examples a second, median of turns (× over the reference in fp32)")
    columns = [f"{shape} {name}" for shape in ("quickstart", "small") for name in sets]
    for column in ("", *columns):
        table.add_column(column, justify="right")
    sides = dict.fromkeys(name.split(" ", 2)[2] for name in medians)
    for side in sides:
        cells = [
            f"{medians[f'{c} {side}']:.1f} ({medians[f'{c} {side}'] / medians[f'{c} reference fp32']:.2f})"
            for c in columns
        ]
        table.add_row(side, *cells)
    console.print(table)


def _rows(reference: Path, name: str) -> list[TrainRow]:
    """Rows with rationales, through the stages that a user would take them through."""
    with tempfile.TemporaryDirectory() as folder:
        sets = [f"source.root={(reference / name).resolve()}", f"storage={folder}", "teacher.splits=[train]"]
        line = Lineage(load_recipe(name, sets))
        build_rationales(line)
        build_dataset(line)
        drawn = draw_rows(line.dataset.iter_rows("train"), Run(arm="step_by_step"))
    return [row for row in drawn if row.rationales]


def _tokenizer(rows: Sequence[TrainRow]) -> Any:
    """A tokenizer that makes about as many tokens of these texts as T5's own, which can't be had without a download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    texts = [text for row in rows for text in (row.input, row.rationales[0].text)]
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _lengths(tokenizer: Any, rows: Sequence[TrainRow]) -> str:
    def mean(texts: list[str]) -> float:
        return statistics.mean(map(len, tokenizer(texts)["input_ids"]))

    inputs, labels, said = zip(*((row.input, row.label, row.rationales[0].text) for row in rows), strict=True)
    return (
        f"{len(rows):,} rows, on average {mean(list(inputs)):.0f} tokens of input, {mean(list(labels)):.0f} of label, "
        f"{mean(list(said)):.0f} of rationale"
    )


def _model(shape: str, tokenizer: Any) -> Any:
    from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    if shape == "quickstart":
        config = AutoConfig.from_pretrained(resolve(load_recipe("quickstart").student.model))
        config.vocab_size = len(tokenizer)
    else:  # T5 v1.1 small
        config = T5Config(
            vocab_size=32128,
            d_model=512,
            d_kv=64,
            d_ff=1024,
            num_layers=8,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    config.dropout_rate = 0.0  # both sides lose as much by it, and without it the losses can be compared
    return T5ForConditionalGeneration(config)


def _sides(model: Any, tokenizer: Any, rows: Sequence[TrainRow]) -> dict[str, Side]:
    """All sides, on copies of their own of the model."""
    from copy import deepcopy

    precisions = {"fp32": nullcontext(), "bf16": torch.autocast("cpu", torch.bfloat16)}
    sides: dict[str, Side] = {}
    for precision, context in precisions.items():
        own = deepcopy(model)
        sides[f"reference {precision}"] = _reference(own, tokenizer, Schedule(rows, 0, BATCH), context)
        for name, by_length, prefix in (
            ("exact", False, "encoder"),
            ("by length", True, "encoder"),
            ("decoder", True, "decoder"),
        ):
            own = deepcopy(model)
            schedule = Schedule(rows, 0, BATCH, by_length)
            collate = Collator(own, tokenizer, "step_by_step", 1024, 256, prefix)
            sides[f"{name} {precision}"] = _ours(own, collate, schedule, context)
    return sides


def _ours(model: Any, collate: Collator, schedule: Schedule, context: Any) -> Side:
    objective = Objective(model, ALPHA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def turn(steps: int) -> None:
        for step in range(steps):
            with context:
                loss, _ = objective(collate(schedule.step(step)))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return turn


def _reference(model: Any, tokenizer: Any, schedule: Schedule, context: Any) -> Side:
    """The step of the reference implementation: two passes of the model's own forward, each over padded rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False, fused=False)

    def task(prefix: str, rows: Sequence[TrainRow], targets: list[str]) -> Any:
        inputs = tokenizer([prefix + row.input for row in rows], padding=True, return_tensors="pt")
        made = tokenizer(targets, padding=True, return_tensors="pt")
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss

    def turn(steps: int) -> None:
        for step in range(steps):
            rows = schedule.step(step)
            with context:
                label = task(LABEL_PREFIX, rows, [row.label for row in rows])
                rationale = task(RATIONALE_PREFIX, rows, [row.rationales[0].text for row in rows])
                loss = ALPHA * label + (1 - ALPHA) * rationale
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return turn


# two workers under DeepSpeed, of one thread each


def _two_workers(rounds: int) -> float:
    """Examples a second of two workers over those of one, on the same batches, of the recipe's default size: what
    workers tell each other after a step is as much for a batch of any size."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(rounds):
        for world, made in speeds.items():
            port = str(29600 + 2 * turn + world)
            command = [sys.executable, __file__, "worker", str(world), port]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
            workers = [
                subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
                for rank in range(world)
            ]
            outputs = [worker.communicate(timeout=600)[0] for worker in workers]
            made.append(float(next(t for t in outputs[0].splitlines() if t.startswith("RATE ")).split()[1]))
    return statistics.median(speeds[2]) / statistics.median(speeds[1])


@app.command(hidden=True)
def worker(world: int, port: str, rank: int) -> None:
    """One worker; prints examples a second of all."""
    import deepspeed

    from pipelines.deepspeed_config import deepspeed_config
    from pipelines.recipe import Student

    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}.items():
        os.environ[name] = str(value)
    deepspeed.ops.__compatible_ops__ = {}
    student = Student(workers=world, precision="fp32", zero_stage=1)
    size = student.batch_size
    rows = _made_up_rows(3 * size)
    tokenizer = _tokenizer(rows)
    model = _model("small", tokenizer)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    engine, *_ = deepspeed.initialize(
        model=Objective(model, ALPHA), model_parameters=model.parameters(), config=deepspeed_config(student)
    )
    collate, schedule = Collator(model, tokenizer, "step_by_step", 1024, 256), Schedule(rows, 0, size)
    start = 0.0
    for step in range(3):
        if step == 1:  # the first lays out memory
            start = time.perf_counter()
        batch = collate(deal(schedule.step(step), world)[rank])
        totals = batch.totals()
        torch.distributed.all_reduce(totals)
        loss, _ = engine(batch, totals)
        engine.backward(loss * world)
        engine.step()
    print(f"RATE {2 * size / (time.perf_counter() - start)}")
    torch.distributed.destroy_process_group()


def _made_up_rows(count: int) -> list[TrainRow]:
    """Rows about as long as SVAMP's and CommonsenseQA's, without their files."""
    from random import Random

    from pipelines.draw import Rationale

    dice = Random(0)
    words = ["".join(dice.choices("abcdefghij", k=4)) for _ in range(2000)]

    def text(low: int, high: int) -> str:
        return " ".join(dice.choices(words, k=dice.randint(low, high)))

    return [TrainRow(str(n), text(30, 110), text(1, 5), (Rationale(text(15, 55)),)) for n in range(count)]


if __name__ == "__main__":
    app()
