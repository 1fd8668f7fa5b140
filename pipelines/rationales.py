"""STAGE 1 `distill rationales`: examples → the teacher's texts → accepted and rejected rationales.

Writes three artefacts: `examples`, `generations` (the teacher's raw texts, paid for once) and
`rationales` (folders `accepted` and `rejected`, where each rejected row has its reason). Accepted plus
rejected is what was asked for.
"""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifact import Artifact
from pipelines.console import say, show_table
from pipelines.curate import judge
from pipelines.errors import UserError
from pipelines.examples import build_examples
from pipelines.lineage import Lineage
from pipelines.ray_session import ray_session
from pipelines.schema import GENERATIONS, RATIONALES, REJECTED, SPLITS, Reason
from pipelines.teacher import generate, given_outputs

Row = dict[str, Any]
Funnel = dict[str, dict[str, int]]


def build_rationales(line: Lineage, force: bool = False) -> Artifact:
    """Make the rationales artefact and its parents, or find them done.

    `force` judges the texts anew; it never pays the teacher for the same texts again.

    Raises:
        UserError: the source, the given outputs or the teacher's model are at fault.
    """
    build_examples(line)
    build_generations(line)
    artifact = line.rationales
    if artifact.begin(force):
        _judge_all(line, artifact)
    manifest = artifact.manifest()
    _show_funnel(manifest["funnel"])
    for split, score in manifest["teacher_accuracy"].items():
        say(f"  teacher's labels right on {split}: {score['accuracy']:.4f} of {score['rows']:,} rows with gold")
    return artifact


def build_generations(line: Lineage) -> Artifact:
    """Make the teacher's texts, or find them done."""
    artifact = line.generations
    if not artifact.begin(force=False):
        return artifact
    start = time.time()
    asked = _asked_splits(line)
    if line.recipe.teacher.engine == "outputs":
        examples = pa.concat_tables([line.examples.read_table(split) for split in asked])
        read = {split: count["read"] for split, count in line.examples.manifest()["counts"].items()}
        with artifact.writer("rows", GENERATIONS) as rows:
            for row in given_outputs(line, examples, read):
                rows.add(row)
    else:
        _generate(line, artifact, asked)
    lengths = artifact.read_table("rows", columns=["input_tokens", "output_tokens"])
    tokens = {name: pc.sum(lengths[name]).as_py() or 0 for name in lengths.column_names}
    expected = sum(line.examples.manifest()["counts"][split]["kept"] for split in asked)
    if len(lengths) != expected:
        raise RuntimeError(f"{artifact.uri}: {len(lengths)} texts for {expected} examples")
    artifact.finish(line.snapshot(), [line.examples], start, rows=len(lengths), **tokens)
    seconds = artifact.manifest()["seconds"]
    say(
        f"  {len(lengths):,} texts in {seconds:,.0f} s,"
        f" {tokens['input_tokens']:,} tokens in, {tokens['output_tokens']:,} out"
    )
    return artifact


def _generate(line: Lineage, artifact: Artifact, asked: list[str]) -> None:
    with ray_session():
        import ray

        filesystem = None if artifact.local else artifact.fs
        paths = [line.examples.path(split) for split in asked]
        examples = ray.data.read_parquet(paths, filesystem=filesystem, columns=["row_id", "split", "input"])
        generate(line, examples).write_parquet(artifact.path("rows"), filesystem=filesystem)


def _asked_splits(line: Lineage) -> list[str]:
    """The splits that the teacher is asked for and that the source has."""
    teacher = line.recipe.teacher
    wanted = list(teacher.outputs) if teacher.engine == "outputs" else list(teacher.splits)
    present = line.examples.manifest()["counts"]
    asked: list[str] = [split for split in SPLITS if split in wanted and split in present]
    if not asked:
        raise UserError(f"teacher: none of the splits {', '.join(wanted)} is in the source ({', '.join(present)})")
    return asked


def _judge_all(line: Lineage, artifact: Artifact) -> None:
    start = time.time()
    funnel: dict[str, Counter[str]] = {}
    right: dict[str, list[bool]] = {}
    with artifact.writer("accepted", RATIONALES) as accepted, artifact.writer("rejected", REJECTED) as rejected:
        for row, gold in _judged(line):
            (rejected if row["reason"] else accepted).add(row)
            funnel.setdefault(row["split"], Counter())[row["reason"] or "accepted"] += 1
            if gold is not None:
                right.setdefault(row["split"], []).append(line.task.same(row["label"], gold))
    artifact.finish(
        line.snapshot(),
        [line.generations],
        start,
        funnel={split: dict(count) for split, count in funnel.items()},
        teacher_accuracy={s: {"accuracy": sum(r) / len(r), "rows": len(r)} for s, r in right.items()},
    )


def _judged(line: Lineage) -> Iterator[tuple[Row, str | None]]:
    """Each generation with what was read from it and its reason, and the row's gold label."""
    known = {
        row["row_id"]: (row["label"], row["choices"])
        for split in _asked_splits(line)
        for row in line.examples.read_table(split, columns=["row_id", "label", "choices"]).to_pylist()
    }
    for row in line.generations.iter_rows("rows"):
        gold, choices = known[row["row_id"]]
        compared = gold if row["split"] == "train" else None  # the test split is scored, never filtered
        yield judge(line.task, line.recipe.curate, row, choices, compared), gold


def _show_funnel(funnel: Funnel) -> None:
    splits = [s for s in SPLITS if s in funnel]
    reasons = [r for r in Reason if any(r in funnel[s] for s in splits)]
    rows = [["asked for", *(f"{sum(funnel[s].values()):,}" for s in splits)]]
    rows += [[f"  {name}", *(f"{funnel[s].get(name, 0):,}" for s in splits)] for name in ("accepted", *reasons)]
    show_table("Rationales", ["", *splits], rows)
