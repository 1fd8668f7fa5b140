"""A replica of the teacher: asks an engine batch by batch, and writes every batch as a part before it tells of it."""

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifact import Artifact
from pipelines.curate import judge
from pipelines.engines import Completion, Engine, EngineDied, Request
from pipelines.errors import UserError
from pipelines.lineage import ROWS
from pipelines.pending import Asking, keys_of
from pipelines.prompts import answer_structure, chat_messages, completion_prompt, prompt_hash
from pipelines.recipe import Curate, Teacher
from pipelines.schema import GENERATIONS
from pipelines.tasks import Task

Row = dict[str, Any]
_TRIES = "tries"  # the folder where batches are counted that replicas died on
_DEATHS = 2  # of replicas, after the first, before a batch is tried row by row, and a row is given up


class Replica:
    """Holds an engine.

    Args:
        revived: whether its forerunner died, 0 or 1.
    """

    def __init__(
        self, asking: Asking, examples: Artifact, task: Task, curate: Curate, engine: Engine, revived: int = 0
    ) -> None:
        self.asking, self.examples, self.task, self.curate = asking, examples, task, curate
        self.engine, self.revived = engine, revived
        self.name, self.since = uuid.uuid4().hex, time.time()
        self._alone = threading.Lock()
        self._read = lru_cache(maxsize=8)(self._read_part)  # the batches of a task are mostly of one part

    def answer(self, batches: Sequence[Row]) -> list[Row]:
        """The batches of a task, see `pending.tasks`, → reports of what became of them."""
        tables = [self._table(batch) for batch in batches]
        artifact, whole = self.asking.artifact, _name(tables)
        if len(tables) > 1 and artifact.fs.exists(artifact.path(f"{whole}.parquet")):
            made = artifact.read_table(whole).to_pylist()  # Ray tries a task again whose replica died late
            return [self.report(pa.concat_tables(tables).to_pylist(), made)]
        answered = [part for table in tables for part in self._answer(table)]
        if len(tables) > 1:
            self._join([name for name, _ in answered], whole)
        return [report for _, report in answered]

    def _table(self, batch: Row) -> pa.Table:
        """The rows of a batch, with `sample`."""
        rows, samples = (np.frombuffer(batch[name], np.int32) for name in ("rows", "samples"))
        return self._read(batch["part"]).take(rows).append_column("sample", pa.array(samples))

    def _join(self, names: Sequence[str], whole: str) -> None:
        """The parts of a task as one. A kill before the last is gone leaves texts twice, which does no harm."""
        artifact = self.asking.artifact
        artifact.write_part(whole, pa.concat_tables([artifact.read_table(name) for name in names]))
        for name in names:
            artifact.fs.rm_file(artifact.path(f"{name}.parquet"))

    def _read_part(self, part: str) -> pa.Table:
        columns = ["row_id", "split", "input", "choices", "label"]
        try:
            return pq.read_table(part, columns=columns, filesystem=self.examples.fs)
        except FileNotFoundError as error:  # nodes that were there at the start have been asked; this one came later
            raise UserError(
                f"{self.examples.uri}: node {socket.gethostname()} does not share this folder; give a storage that "
                "all nodes share, such as s3://bucket/prefix"
            ) from error

    def _answer(self, table: pa.Table) -> Iterator[tuple[str, Row]]:
        """Ask for rows of examples with `sample`; write them as one part, or as one each where replicas have died on
        this batch; give the name and a report of each."""
        name = _name([table])
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
        yield name, self.report(rows, made)

    def _try(self, name: str) -> int:
        """How often a batch was begun by replicas that had died before, this time included."""
        artifact = self.asking.artifact
        tries = f"{_TRIES}/{name.rpartition('/')[2]}"
        path = artifact.path(tries)
        number = 1 + (int(artifact.fs.cat_file(path)) if artifact.fs.exists(path) else 0)
        artifact.write_text(tries, str(number))
        return number

    def report(self, rows: list[Row], made: list[Row]) -> Row:
        """What became of rows."""
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


def _name(tables: Sequence[pa.Table]) -> str:
    """Of the part with these rows."""
    keys = b" ".join(key for table in tables for key in keys_of(table))
    return f"{ROWS}/{hashlib.sha256(keys).hexdigest()[:24]}"


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
