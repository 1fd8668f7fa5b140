"""Ask the teacher: examples → texts, through Ray Data, with a part file for every batch.

A part is written by the replica that made it, before anything else hears of it. So a run that is killed has
lost only what was under way, and the next run asks for what is not on disk yet. Ray Data's own checkpoints
commit when a whole write task ends, which is too late for rows that cost money.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pyarrow as pa

from pipelines.artifact import Artifact
from pipelines.console import say
from pipelines.engines import Engine, Request
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.meter import Meter, Metrics
from pipelines.pending import CALLS, Asking, Keys, keys_on_disk, pending, tasks
from pipelines.prompts import stop_strings
from pipelines.ray_session import ray_session, tables
from pipelines.recipe import Curate, Teacher
from pipelines.replica import Replica
from pipelines.tasks import Task

Row = dict[str, Any]


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


def _stream(line: Lineage, asking: Asking, done: Keys, limit: int) -> Iterator[Row]:
    """A report of every batch, as the replicas write them.

    The dataset holds only where the rows stand, and replicas read them: so nothing but engines needs a CPU. A task is
    one batch, or of very many rows some, so that few rows can still use many replicas.
    """
    import ray.data

    teacher = asking.teacher
    low, high = (1, 1) if teacher.engine == "openai" else teacher.replicas  # one client holds the endpoint's limits
    work = list(tasks(line, asking, done, limit))
    if not work:
        return
    items = ray.data.from_items(work, override_num_blocks=len(work))
    items.context.execution_options.label_selector = teacher.node_labels or None  # of the nodes it asks for, too
    reports = items.map_batches(
        Asker,
        fn_constructor_args=(asking, line.examples, line.task, line.recipe.curate),
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(
            min_size=low, max_size=high, max_concurrent_calls_per_actor=CALLS, enable_true_multi_threading=True
        ),
        num_cpus=teacher.cpus if not teacher.endpoint else 1,
        num_gpus=teacher.gpus,
    )
    for table in tables(reports):
        yield from table.to_pylist()


class Asker:
    """A replica, as an actor of Ray Data."""

    def __init__(self, asking: Asking, examples: Artifact, task: Task, curate: Curate) -> None:
        import ray

        revived = int(ray.get_runtime_context().was_current_actor_reconstructed)
        self.replica = Replica(asking, examples, task, curate, open_engine(asking.teacher, task), revived)

    def __call__(self, table: pa.Table) -> dict[str, list[Any]]:
        """A task, as `pending.tasks` makes it, → reports of what became of its batches."""
        [task] = table.to_pylist()
        try:
            reports = self.replica.answer(task["batches"])
        except (UserError, OSError) as error:
            stop = _ours(error, self.replica.asking.artifact)
            if stop is None:
                raise
            reports = [self.replica.report([], []) | {"stop": str(stop)}]  # Ray Data would lose the kind of error
        return {column: [report[column] for report in reports] for column in reports[0]}


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
