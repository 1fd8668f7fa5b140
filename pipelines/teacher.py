"""Ask the teacher: examples → texts, through Ray Data, with a part file for every batch.

A part is written by the replica that made it, before anything else hears of it. So a run that is killed has
lost only what was under way, and the next run asks for what is not on disk yet. Ray Data's own checkpoints
commit when a whole write task ends, which is too late for rows that cost money.
"""

import errno
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifact import Artifact
from pipelines.console import say
from pipelines.curate import judge
from pipelines.engines import Completion, Engine, EngineDied, Request
from pipelines.errors import UserError
from pipelines.lineage import ROWS, Lineage
from pipelines.meter import Meter, Metrics
from pipelines.prompts import answer_structure, chat_messages, completion_prompt, prompt_hash, stop_strings
from pipelines.ray_session import ray_session
from pipelines.recipe import Curate, Teacher
from pipelines.schema import GENERATIONS
from pipelines.tasks import Task

Row = dict[str, Any]
Keys = np.ndarray[Any, np.dtype[np.bytes_]]  # sorted b"row_id/sample"
_CALLS = 4  # batches that a replica has under way at once, so that its engine never runs dry
_TRIES = "tries"  # the folder where batches are counted that replicas died on
_DEATHS = 2  # of replicas, after the first, before a batch is tried row by row, and a row is given up


@dataclass(frozen=True)
class Asking:
    """One pass over the teacher: which texts, and where they go.

    Args:
        samples: the numbers of the samples wanted of each row.
        only: the keys wanted; None: all.
        hinted: with the gold label told.
        teacher: as in the recipe, or with what this pass changes of the sampling.
    """

    artifact: Artifact
    teacher: Teacher
    samples: range
    only: Keys | None = None
    hinted: bool = False


def ask(line: Lineage, asking: Asking) -> Row | None:
    """Have the texts of a pass written, those that are not there yet.

    Returns:
        What this run has spent, as `Meter.account`; None when there was nothing to do.

    Raises:
        UserError: a limit of the budget is reached, too many texts are rejected, the engine does not start, the
            endpoint refuses, the disk is full, or another run is at work on the artefact. What is written stays.
    """
    if asking.teacher.engine == "openai":
        from pipelines.engines.endpoint import EndpointEngine

        with closing(EndpointEngine(asking.teacher, [])) as engine:
            engine.check()  # before anything is started
    for number, exemplar in enumerate(line.task.exemplars, 1):
        if exemplar.rationale.full.startswith("TODO"):
            say(f"  exemplar {number} still says {exemplar.rationale.full!r}, and the teacher will write the like")
    with asking.artifact.lease():
        done = keys_on_disk(asking.artifact)
        count = sum(len(texts) for _, texts in pending(line, asking, done))
        if not count:
            return None
        try:
            with (
                ray_session(line.recipe.storage),
                Meter(line.recipe, asking.artifact, count, Metrics(line.recipe.name)) as meter,
            ):
                for report in _stream(line, asking, done, meter.allowed):
                    meter.add(report)
        except Exception as error:
            raise _ours(error, asking.artifact) or error from None
        if meter.allowed < count:
            raise UserError(f"budget.max_rows is reached at {meter.paid_rows:,} texts; raise it and run again to go on")
        missing = count - (len(keys_on_disk(asking.artifact)) - len(done))
        if missing:
            raise RuntimeError(f"{asking.artifact.uri}: {missing} of {count} texts were not written")
        return meter.account


def keys_on_disk(artifact: Artifact) -> Keys:
    """The texts that are there, sorted."""
    batches = artifact.dataset(ROWS, GENERATIONS).to_batches(columns=["row_id", "sample"])
    return np.unique(np.concatenate([np.empty(0, dtype="S1"), *map(_keys, batches)]))


def make_keys(rows: Sequence[tuple[str, int]]) -> Keys:
    """Keys of (row_id, sample) pairs."""
    return np.unique(np.array([f"{row_id}/{sample}".encode() for row_id, sample in rows], dtype="S"))


def _keys(table: pa.Table | pa.RecordBatch) -> Keys:
    pairs = zip(table["row_id"].to_pylist(), table["sample"].to_pylist(), strict=True)
    return np.array([f"{row_id}/{sample}".encode() for row_id, sample in pairs], dtype="S")


def pending(line: Lineage, asking: Asking, done: Keys) -> Iterator[tuple[str, pa.Table]]:
    """The texts that a pass still wants: each part of the examples with a table of row_id, sample, and the row's
    number within the part."""
    count = len(asking.samples)
    for split in line.asked:
        for part in line.examples.parts(split):
            row_ids = pq.read_table(part, columns=["row_id"], filesystem=line.examples.fs)["row_id"]
            numbers = np.repeat(np.arange(len(row_ids), dtype=np.int32), count)
            samples = np.tile(np.array(asking.samples, dtype=np.int32), len(row_ids))
            table = pa.table({"row_id": row_ids.take(numbers), "sample": samples, "row": numbers})
            keys = _keys(table)
            wanted = ~_among(keys, done)
            if asking.only is not None:
                wanted &= _among(keys, asking.only)
            yield part, table.filter(pa.array(wanted))


def _among(keys: Keys, known: Keys) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which keys stand in a sorted array."""
    if not len(known):
        return np.zeros(len(keys), dtype=bool)
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.asarray(known[at] == keys)


def _batches(line: Lineage, asking: Asking, done: Keys, limit: int) -> Iterator[Row]:
    """What is pending, at most `limit` texts, in batches that say where their rows stand."""
    teacher = asking.teacher
    under_way = teacher.endpoint.concurrency if teacher.endpoint else teacher.batch_size
    size = max(1, under_way // _CALLS)
    for part, texts in pending(line, asking, done):
        texts = texts.slice(0, limit)
        limit -= len(texts)
        for at in range(0, len(texts), size):
            batch = texts.slice(at, size)
            yield {"part": part, "rows": batch["row"].to_pylist(), "samples": batch["sample"].to_pylist()}


def _stream(line: Lineage, asking: Asking, done: Keys, limit: int) -> Iterator[Row]:
    """A report of every batch, as the replicas write them.

    The dataset holds only where the rows stand, and replicas read them: so nothing but engines needs a CPU, and a
    task is one batch, so that few rows can still use many replicas.
    """
    import ray.data

    teacher = asking.teacher
    low, high = (1, 1) if teacher.engine == "openai" else teacher.replicas  # one client holds the endpoint's limits
    batches = list(_batches(line, asking, done, limit))
    if not batches:
        return
    items = ray.data.from_items(batches, override_num_blocks=len(batches))
    items.context.execution_options.label_selector = teacher.node_labels or None  # of the nodes it asks for, too
    reports = items.map_batches(
        Asker,
        fn_constructor_args=(asking, line.examples, line.task, line.recipe.curate),
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(
            min_size=low, max_size=high, max_concurrent_calls_per_actor=_CALLS, enable_true_multi_threading=True
        ),
        num_cpus=teacher.cpus if not teacher.endpoint else 1,
        num_gpus=teacher.gpus,
    )
    yield from reports.iter_rows()


class Asker:
    """A replica: holds an engine, asks it batch by batch, writes every batch as a part."""

    def __init__(self, asking: Asking, examples: Artifact, task: Task, curate: Curate) -> None:
        import ray

        self.asking, self.examples, self.task, self.curate = asking, examples, task, curate
        self.engine = open_engine(asking.teacher, task)
        self.name, self.since = uuid.uuid4().hex, time.time()
        self._alone = threading.Lock()
        self.revived = int(ray.get_runtime_context().was_current_actor_reconstructed)

    def __call__(self, table: pa.Table) -> dict[str, list[Any]]:
        """A batch, as `_batches` makes them, → reports of what became of it."""
        [batch] = table.to_pylist()
        try:
            rows = self._read(batch["part"]).take(batch["rows"])
            reports = [*self._answer(rows.append_column("sample", pa.array(batch["samples"], pa.int32())))]
        except (UserError, OSError) as error:
            stop = _ours(error, self.asking.artifact)
            if stop is None:
                raise
            reports = [self._report([], []) | {"stop": str(stop)}]  # Ray Data would lose what kind of error it is
        return {column: [report[column] for report in reports] for column in reports[0]}

    def _read(self, part: str) -> pa.Table:
        columns = ["row_id", "split", "input", "choices", "label"]
        try:
            return pq.read_table(part, columns=columns, filesystem=self.examples.fs)
        except FileNotFoundError as error:  # nodes that were there at the start have been asked; this one came later
            raise UserError(
                f"{self.examples.uri}: node {socket.gethostname()} does not share this folder; give a storage that "
                "all nodes share, such as s3://bucket/prefix"
            ) from error

    def _answer(self, table: pa.Table) -> Iterator[Row]:
        """Ask for rows of examples with `sample`; write them as one part, or as one each where replicas have died on
        this batch; give a report of each."""
        name = f"{ROWS}/{hashlib.sha256(b' '.join(_keys(table))).hexdigest()[:24]}"
        if self.revived and len(table) > 1 and self._try(name) > _DEATHS:
            for at in range(len(table)):
                with self._alone:  # or a row that kills would take others with it
                    yield from self._answer(table.slice(at, 1))
            return
        artifact, rows = self.asking.artifact, table.to_pylist()
        if artifact.fs.exists(artifact.path(f"{name}.parquet")):  # Ray tries a batch again whose replica died late
            made = artifact.read_table(name).to_pylist()
        else:
            deadly = self.revived and len(table) == 1 and self._try(name) > _DEATHS
            made = write_texts(_Deadly() if deadly else self.engine, self.asking, self.task, rows)
            artifact.write_part(name, pa.Table.from_pylist(made, schema=GENERATIONS))
        yield self._report(rows, made)

    def _try(self, name: str) -> int:
        """How often a batch was begun by replicas that had died before, this time included."""
        artifact = self.asking.artifact
        tries = f"{_TRIES}/{name.rpartition('/')[2]}"
        path = artifact.path(tries)
        number = 1 + (int(artifact.fs.cat_file(path)) if artifact.fs.exists(path) else 0)
        artifact.write_text(tries, str(number))
        return number

    def _report(self, rows: list[Row], made: list[Row]) -> Row:
        judged = [_judged(self.task, self.curate, self.asking, *pair) for pair in zip(rows, made, strict=True)]
        return {
            "replica": self.name,
            "since": self.since,
            "ready": getattr(self.engine, "ready_at", self.since),
            "at": time.time(),
            "restarts": self.revived,
            "stop": "",  # why no replica need go on
            **{n: sum(row[n] or 0 for row in made) for n in ("input_tokens", "cached_tokens", "output_tokens")},
            "outcomes": json.dumps(Counter(row["reason"] or "accepted" for row in judged)),
            "rejects": json.dumps(
                [[r["reason"], r["row_id"], r["detail"], r["text"]] for r in judged if r["reason"]][:5]
            ),
        }


class _Deadly:
    """In place of an engine, for a row that killed its replica each time."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [Completion("", "error", "every replica that was asked for this row died")] * len(requests)

    def close(self) -> None: ...


def write_texts(engine: Engine, asking: Asking, task: Task, rows: Sequence[Row]) -> list[Row]:
    """`schema.GENERATIONS` rows for rows of examples with `sample`."""
    teacher = asking.teacher
    try:
        made = engine.generate([_request(teacher, task, row, asking.hinted) for row in rows])
    except EngineDied:
        os._exit(1)  # Ray starts another replica, in a process of its own, and tries this batch again
    shared = {
        "teacher": teacher.model,
        "prompt_hash": prompt_hash(task, teacher.prompt, teacher.rationale_length, asking.hinted),
    }
    return [
        {name: row[name] for name in ("row_id", "split", "sample")} | shared | vars(completion)
        for row, completion in zip(rows, made, strict=True)
    ]


def _request(teacher: Teacher, task: Task, row: Row, hinted: bool) -> Request:
    hint = row["label"] if hinted else None
    render = chat_messages if teacher.prompt == "chat" else completion_prompt
    seed = None
    if teacher.temperature > 0:  # its own, so that a text does not depend on what it was batched with
        digest = hashlib.sha256(f"{teacher.seed}/{row['row_id']}/{row['sample']}".encode()).digest()
        seed = int.from_bytes(digest[:4]) >> 1
    return Request(
        render(task, row["input"], teacher.rationale_length, hint),
        seed,
        answer_structure(task, row["choices"]) if teacher.constrain_answer else None,
    )


def _judged(task: Task, curate: Curate, asking: Asking, example: Row, made: Row) -> Row:
    gold = example["label"] if example["split"] == "train" else None
    return judge(task, curate, made, example["choices"], gold, asking.hinted, asking.teacher.prompt)


def open_engine(teacher: Teacher, task: Task) -> Engine:
    """The engine of a recipe; it starts at its first request."""
    stop = stop_strings(task, teacher.prompt)
    if teacher.engine == "openai":
        from pipelines.engines.endpoint import EndpointEngine

        return EndpointEngine(teacher, stop)
    from pipelines.engines.vllm_engine import VllmEngine

    return VllmEngine(teacher, stop)


@contextmanager
def proposer(model: str | None, gpus: int) -> Iterator[Callable[[list[str]], list[str]] | None]:
    """A function from prompts to texts by this model, as long as the context lasts; None without a model."""
    if model is None:
        yield None
        return
    from pipelines.engines.vllm_engine import VllmEngine

    teacher = Teacher(model=model, gpus=gpus)
    with closing(VllmEngine(teacher, [])) as engine:
        yield lambda prompts: [made.text for made in engine.generate([Request(prompt) for prompt in prompts])]


def _ours(error: BaseException | None, artifact: Artifact) -> UserError | None:
    """What the user can put right, within an exception of Ray."""
    while error is not None:
        if isinstance(error, UserError):
            return UserError(str(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(f"{artifact.uri}: no space left; free some and run again, what is there is kept")
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
