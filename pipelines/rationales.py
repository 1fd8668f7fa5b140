"""STAGE 1 `distill rationales`: examples → the teacher's texts → accepted and rejected rationales.

Writes three kinds of artefact: `examples`, `generations` (the teacher's raw texts, paid for once) and
`rationales` (folders `accepted` and `rejected`, where each rejected text has its reason). Accepted plus
rejected is what was asked for.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from pipelines.artifact import Artifact
from pipelines.console import say, show_table, track
from pipelines.curate import judge, vote
from pipelines.engines.outputs import given_outputs
from pipelines.errors import UserError
from pipelines.examples import build_examples
from pipelines.lineage import ROWS, Lineage
from pipelines.meter import TOKENS, cost, gpu_hours, spent
from pipelines.pending import Asking, make_keys
from pipelines.schema import GENERATIONS, RATIONALES, REJECTED, SPLITS, Reason
from pipelines.scratch import RowsById, scratch_database
from pipelines.teacher import ask

Row = dict[str, Any]
Funnel = dict[str, dict[str, int]]
# what a second try may mend; a label that disagrees with gold is retried when it is named
RETRIED = (
    Reason.ENGINE_ERROR,
    Reason.TRUNCATED,
    Reason.UNPARSABLE,
    Reason.LABEL_NOT_IN_SET,
    Reason.TOO_SHORT,
    Reason.TOO_LONG,
    Reason.ANSWER_LEAK,
)
RETRIABLE = (*RETRIED, Reason.DISAGREES_WITH_GOLD)


def build_rationales(line: Lineage, force: bool = False) -> Artifact:
    """Make the rationales artefact and its parents, or find them done.

    `force` judges the texts anew; it never pays the teacher for the same texts again.

    Raises:
        UserError: the source, the given outputs or the teacher are at fault, or a limit is reached.
    """
    build_examples(line)
    build_generations(line)
    artifact = line.rationales
    if line.recipe.curate.on_disagree == "rationalize" and (force or not artifact.done()):
        _rationalize(line)
    if artifact.begin(force):
        with artifact.lease():
            _judge_all(line, artifact)
    _show(line, artifact)
    return artifact


def retry_rejected(line: Lineage, reasons: Sequence[str]) -> Lineage:
    """Ask the teacher again for texts that were rejected, with another seed and `teacher.retry_temperature`.

    Args:
        reasons: of which; none means all that a second try may mend, see RETRIED.

    Returns:
        The lineage with the new texts in it: its rationales, and all that follows, have other keys.

    Raises:
        UserError: no rationales yet, no such reason, the engine can't be asked, or tried often enough.
    """
    teacher = line.recipe.teacher
    unknown = [reason for reason in reasons if reason not in RETRIABLE]
    if unknown:
        raise UserError(f"--retry-rejected {unknown[0]}: give one or more of {', '.join(RETRIABLE)}")
    if teacher.engine == "outputs":
        raise UserError("--retry-rejected: teacher.engine outputs can't be asked again; mend the given texts")
    rejected = line.require(line.rationales, "rationales").dataset("rejected", REJECTED)
    wanted = pc.field("reason").isin([str(r) for r in reasons or RETRIED]) & ~pc.field("rationalized")
    found = rejected.to_table(columns=["row_id", "sample"], filter=wanted)
    if not len(found):
        say("no rejected text to try again")
        return line
    number = len(line.retries) + 1
    if number > teacher.max_retries:
        raise UserError(f"tried again {teacher.max_retries} times already; raise teacher.max_retries to go on")
    say(f"try {number} of {teacher.max_retries}: {len(found):,} rejected texts")
    keys = make_keys(list(zip(found["row_id"].to_pylist(), found["sample"].to_pylist(), strict=True)))
    changed = teacher.model_copy(update=line.retry_sampling(number))
    _write(line, Asking(line.retry(number), changed, range(teacher.samples), only=keys))
    return Lineage(line.recipe)


def build_generations(line: Lineage) -> Artifact:
    """Make the teacher's texts, or find them done."""
    artifact, teacher = line.generations, line.recipe.teacher
    if teacher.engine == "outputs":
        if artifact.begin(force=False):
            with artifact.lease():
                _take_given(line, artifact)
        return artifact
    covered = artifact.manifest()["covers"] if artifact.done() else {}
    known = covered.get(line.examples.key, {"splits": [], "samples": 0})
    if set(line.asked) <= set(known["splits"]) and teacher.samples <= known["samples"]:
        say(f"generations {artifact.key}: done before, skipped")
        return artifact
    say(f"generations {artifact.key}: {artifact.uri}")
    covers = covered | {line.examples.key: {"splits": line.asked, "samples": teacher.samples}}
    _write(line, Asking(artifact, teacher, range(teacher.samples)), covers=covers)
    return artifact


def _take_given(line: Lineage, artifact: Artifact) -> None:
    start = time.time()
    with artifact.writer(ROWS, GENERATIONS) as rows:
        for row in _given(line):
            rows.add(row)
    artifact.finish(line.snapshot(), [line.examples], start, rows=artifact.dataset(ROWS, GENERATIONS).count_rows())


def _given(line: Lineage) -> Iterator[Row]:
    """Texts that the user already has, of all splits that they are given for."""
    counts, limited = line.examples.manifest()["counts"], line.recipe.source.limit is not None
    for split, pattern in line.recipe.teacher.outputs.items():
        if split not in counts:
            raise UserError(f"teacher.outputs.{split}: the recipe's source has no {split}")
        files, examples = line.output_files(pattern), line.examples.iter_rows(split)
        yield from given_outputs(line.task, split, files, examples, counts[split]["read"], limited)


def _rationalize(line: Lineage) -> None:
    """Ask again, with the gold label told, for rows of train of which nothing was accepted (STaR, arXiv 2203.14465)."""
    number = line.recipe.teacher.samples  # one text a row, counted after the ordinary samples
    failed = [
        (row.samples[0]["row_id"], number)
        for row in _judged(line)
        if row.gold is not None and row.split == "train" and all(s["reason"] for s in row.samples)
    ]
    if failed:
        say(f"{len(failed):,} rows of train are asked again, with the gold label told")
        asking = Asking(line.hinted, line.recipe.teacher, range(number, number + 1), make_keys(failed), hinted=True)
        _write(line, asking)


def _write(line: Lineage, asking: Asking, **facts: Any) -> None:
    """Have texts written, then their manifest."""
    start = time.time()
    ask(line, asking)
    artifact, account = asking.artifact, spent(asking.artifact)
    rates = {
        f"{name}_per_second": round(account[name] / max(1e-9, account["seconds"]), 2) for name in ("rows", *TOKENS)
    }
    artifact.finish(
        line.snapshot(),
        [line.examples],
        start,
        **account,
        **rates,
        gpu_hours=gpu_hours(line.recipe.teacher, account["engine_seconds"]),
        cost=cost(line.recipe.teacher.price, account),
        **facts,
    )


@dataclass(frozen=True)
class _Judged:
    """All that was said of one row."""

    split: str
    gold: str | None
    samples: list[Row]  # of schema.REJECTED; without a reason where accepted
    label: str | None  # the teacher's, by vote


def _judged(line: Lineage, hinted: bool = False) -> Iterator[_Judged]:
    """Every row that the teacher was asked, in the order of the examples."""
    task, curate, teacher = line.task, line.recipe.curate, line.recipe.teacher
    texts = [(line.generations, False), *((artifact, False) for artifact in line.retries)]
    if hinted and line.hinted.done():
        texts.append((line.hinted, True))
    with scratch_database() as database:
        said = RowsById(database)
        for artifact, told in texts:
            said.extend({**row, "hinted": told} for row in artifact.iter_rows(ROWS))
        for split in line.asked:
            for example in line.examples.iter_rows(split):
                tries = {row["sample"]: row for row in said.find(example["row_id"])}  # the last of each sample
                if teacher.engine != "outputs":
                    tries = {n: row for n, row in tries.items() if n < teacher.samples or row["hinted"]}
                if not tries:
                    continue
                gold = example["label"]
                compared = gold if split == "train" else None  # the test split is scored, never filtered
                samples = [
                    judge(
                        task,
                        curate,
                        row | {"split": split},
                        example["choices"],
                        compared,
                        row["hinted"],
                        teacher.prompt,
                    )
                    for _, row in sorted(tries.items())
                ]
                by_vote = compared is not None and curate.on_disagree != "keep"
                samples, label = vote(task, samples, curate.min_agreement, by_vote)
                yield _Judged(split, gold, samples, label)


def _judge_all(line: Lineage, artifact: Artifact) -> None:
    start = time.time()
    funnel: dict[str, Counter[str]] = {}
    right: dict[str, Counter[bool]] = {}
    counts = line.examples.manifest()["counts"]
    judged = _judged(line, hinted=line.recipe.curate.on_disagree == "rationalize")
    with artifact.writer("accepted", RATIONALES) as accepted, artifact.writer("rejected", REJECTED) as rejected:
        for row in track(judged, "  reading the texts", sum(counts[split]["kept"] for split in line.asked)):
            for sample in row.samples:
                (rejected if sample["reason"] else accepted).add(sample)
                funnel.setdefault(row.split, Counter())[sample["reason"] or "accepted"] += 1
            if row.gold is not None:
                right.setdefault(row.split, Counter())[line.task.same(row.label, row.gold)] += 1
    artifact.finish(
        line.snapshot(),
        [line.generations],
        start,
        funnel={split: dict(count) for split, count in funnel.items()},
        teacher_accuracy={s: {"accuracy": r[True] / r.total(), "rows": r.total()} for s, r in right.items()},
    )


def _show(line: Lineage, artifact: Artifact) -> None:
    manifest = artifact.manifest()
    _show_funnel(manifest["funnel"])
    for split, score in manifest["teacher_accuracy"].items():
        say(f"  teacher's labels right on {split}: {score['accuracy']:.4f} of {score['rows']:,} rows with gold")
    if line.recipe.teacher.engine != "outputs":
        _show_cost(line, sum(count.get("accepted", 0) for count in manifest["funnel"].values()))


def _show_cost(line: Lineage, accepted: int) -> None:
    """What the texts of the first asking, of retries and of hints came to, over all runs."""
    paid = Counter[str]()
    for artifact in line.paid:
        paid.update(spent(artifact))
    total = cost(line.recipe.teacher.price, paid)
    seconds = max(1e-9, paid["seconds"])
    rows = [
        ["texts", f"{paid['rows']:,}", f"{paid['rows'] / seconds:,.1f} a second"],
        ["input tokens", f"{paid['input_tokens']:,}", f"{paid['input_tokens'] / seconds:,.0f} a second"],
        [
            "  from the prefix cache",
            f"{paid['cached_tokens']:,}",
            f"{paid['cached_tokens'] / max(1, paid['input_tokens']):.1%}",
        ],
        ["output tokens", f"{paid['output_tokens']:,}", f"{paid['output_tokens'] / seconds:,.0f} a second"],
        ["engine hours", f"{paid['engine_seconds'] / 3600:,.3f}", ""],
    ]
    if total:
        rows.append(["cost", f"{total:,.2f}", f"{1000 * total / max(1, accepted):,.2f} per 1,000 accepted"])
    show_table("What the teacher took", ["", "", ""], rows)


def _show_funnel(funnel: Funnel) -> None:
    splits = [s for s in SPLITS if s in funnel]
    reasons = [r for r in Reason if any(r in funnel[s] for s in splits)]
    rows = [["asked for", *(f"{sum(funnel[s].values()):,}" for s in splits)]]
    rows += [[f"  {name}", *(f"{funnel[s].get(name, 0):,}" for s in splits)] for name in ("accepted", *reasons)]
    show_table("Rationales", ["", *splits], rows)
