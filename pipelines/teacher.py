"""Prompts → texts: vLLM in process under Ray Data, or outputs that the user already has.

Both engines give `schema.GENERATIONS` rows and leave reading the texts to others.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.console import say
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.prompts import completion_prompt, prompt_hash, stop_strings
from pipelines.recipe import Teacher, resolve
from pipelines.schema import GENERATIONS
from pipelines.tasks import Task
from pipelines.tasks.sources import read_rows, read_values

Row = dict[str, Any]
_ENGINE_COLUMNS = ("generated_text", "num_input_tokens", "num_generated_tokens")


def generate(line: Lineage, examples: Any) -> Any:
    """Ask the teacher for every example through Ray Data.

    Args:
        examples: a `ray.data.Dataset` of `schema.EXAMPLES` rows.

    Returns:
        A lazy `ray.data.Dataset` of `schema.GENERATIONS` rows; a row that the engine failed on carries its
        error.
    """
    from ray.data.llm import build_processor  # heavy: only where an engine is used

    teacher, task = line.recipe.teacher, line.task
    shared = {"sample": 0, "teacher": teacher.model, "prompt_hash": prompt_hash(task)}
    sampling = {
        "temperature": teacher.temperature,
        "top_p": teacher.top_p,
        "max_tokens": teacher.max_tokens,
        "stop": stop_strings(task),
        "seed": teacher.seed,
    }

    def ask(row: Row) -> Row:
        prompt = completion_prompt(task, row["input"])
        return {"prompt": prompt, "sampling_params": sampling, "row_id": row["row_id"], "split": row["split"]}

    def keep(row: Row) -> Row:
        return {name: row[name] for name in ("row_id", "split", *_ENGINE_COLUMNS)}

    processor = build_processor(engine_config(teacher), preprocess=ask, postprocess=keep)
    return processor(examples).map_batches(
        _as_generations,
        batch_format="pyarrow",
        fn_kwargs={"shared": shared, "max_tokens": teacher.max_tokens},
        num_cpus=0.1,
    )


def engine_config(teacher: Teacher) -> Any:
    """The recipe's teacher as Ray Data's configuration of vLLM. The helper stages are off: vLLM tokenises
    and detokenises itself, and each stage would hold a CPU."""
    from ray.data.llm import vLLMEngineProcessorConfig

    on_gpu = teacher.gpus > 0
    arguments: dict[str, Any] = {"enable_prefix_caching": True, "dtype": teacher.dtype, "revision": teacher.revision}
    environment = {"TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
    if on_gpu:
        arguments["tensor_parallel_size"] = teacher.gpus
        bundles: list[dict[str, float]] = [{"GPU": 1, "CPU": 1}] * teacher.gpus
    else:
        # otherwise vLLM takes most of the machine's memory, and binds every replica to the same cores
        arguments |= {"distributed_executor_backend": "mp", "kv_cache_memory_bytes": int(teacher.kv_cache_gb * 2**30)}
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        bundles = [{"CPU": teacher.cpus}]
    low, high = teacher.replicas
    return vLLMEngineProcessorConfig(
        model_source=resolve(teacher.model),
        engine_kwargs=arguments | teacher.engine_args,
        batch_size=teacher.batch_size,
        concurrency=(low, high),
        placement_group_config={"bundles": bundles},
        should_continue_on_error=True,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        runtime_env={"env_vars": environment},
    )


def _as_generations(table: pa.Table, shared: Row, max_tokens: int) -> pa.Table:
    """What the engine stage leaves → `schema.GENERATIONS`. Rows that it failed on lack the columns of a
    result and name the error."""

    def column(name: str) -> list[Any]:
        known = name in table.column_names
        return table[name].to_pylist() if known else [None] * len(table)

    errors = [error or None for error in column("__inference_error__")]
    lengths = column("num_generated_tokens")
    rows = {
        "row_id": column("row_id"),
        "split": column("split"),
        **{name: [value] * len(table) for name, value in shared.items()},
        "text": [text or "" for text in column("generated_text")],
        "finish_reason": [
            "error" if error else "length" if length >= max_tokens else "stop"  # Ray Data leaves out vLLM's own word
            for error, length in zip(errors, lengths, strict=True)
        ],
        "error": errors,
        "input_tokens": column("num_input_tokens"),
        "output_tokens": lengths,
    }
    return pa.table({field.name: pa.array(rows[field.name], field.type) for field in GENERATIONS})


def given_outputs(line: Lineage, examples: pa.Table, rows_read: Mapping[str, int]) -> Iterator[Row]:
    """Texts that the user already has, joined to the examples.

    A file is either ours (Parquet or JSON lines with `text`, and `row_id` or the columns of the task's
    input), or of the reference layout: arrays of bare strings in the order of the split's rows, where the
    counts must match. An example without a text gets a row with an error.

    Args:
        examples: `schema.EXAMPLES` of all splits.
        rows_read: split -> rows that its source file holds.

    Raises:
        UserError: the counts differ, a row has no text or nothing to join by.
    """
    for split, pattern in line.recipe.teacher.outputs.items():
        if split not in rows_read:
            raise UserError(f"teacher.outputs.{split}: the recipe's source has no {split}")
        files = line.output_files(pattern)
        rows = examples.filter(pc.equal(examples["split"], split)).to_pylist()
        if isinstance(next(read_values(files[0]), None), str):
            limited = line.recipe.source.limit is not None
            texts = _texts_by_position(files, rows, rows_read[split], limited)
        else:
            texts = _texts_by_row_id(line.task, files, rows)
        for row in rows:
            text = texts.get(row["row_id"])
            yield {
                "row_id": row["row_id"],
                "split": split,
                "sample": 0,
                "teacher": "outputs",
                "prompt_hash": "",
                "text": text or "",
                "finish_reason": "outputs" if text is not None else "error",
                "error": None if text is not None else "no output was given for this row",
                "input_tokens": None,
                "output_tokens": None,
            }


def _texts_by_position(files: list[str], rows: list[Row], rows_read: int, limited: bool) -> dict[str, str]:
    """Row id -> text, by the order of the source: all that the reference layout has to join by."""
    texts = [text for file in files for text in read_values(file)]
    if len(texts) != rows_read and not (limited and len(texts) > rows_read):
        raise UserError(
            f"{files[0]} and its {len(files) - 1} further parts hold {len(texts):,} texts, but the source has "
            f"{rows_read:,} rows; texts without row_id are joined by position, so the counts must be the same"
        )
    return {row["row_id"]: str(texts[row["position"]]) for row in rows}


def _texts_by_row_id(task: Task, files: list[str], rows: list[Row]) -> dict[str, str]:
    """Row id -> text, from rows that bring the id or the columns to compute it."""
    texts: dict[str, str] = {}
    for file in files:
        for number, row in enumerate(read_rows(file), 1):
            if row.get("text") is None:
                raise UserError(f"{file}, row {number}: no 'text', which holds the teacher's answer")
            if not row.get("row_id") and any(row.get(field) is None for field in task.fields):
                raise UserError(f"{file}, row {number}: neither 'row_id' nor the columns {', '.join(task.fields)}")
            texts[row.get("row_id") or task.row_id(task.render(row))] = row["text"]
    unknown = len(texts.keys() - {row["row_id"] for row in rows})
    if unknown:
        say(f"  {files[0]}: {unknown:,} texts belong to no example of this split")
    return texts
