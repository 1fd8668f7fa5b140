"""How far students are, as their workers tell it: lines, and on a terminal a bar a student."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from pipelines.console import console, say


@contextmanager
def progress_of(steps: int) -> Iterator[Any]:
    """A queue that workers anywhere on the cluster put messages in, and what shows them.

    A message is `("line", text)` or `("step", student's name, step, losses, examples a second)`.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()  # another node may die, and the students would die of it
    beside_us = NodeAffinitySchedulingStrategy(here, soft=False)
    messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": beside_us})
    columns = ("  {task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[now]}")
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bars: dict[str, TaskID] = {}

        def show(name: str, step: int, losses: dict[str, float], speed: float) -> None:
            parts = "  ".join(f"{part.removesuffix('_loss')} {value:.3f}" for part, value in losses.items())
            if name not in bars:
                bars[name] = progress.add_task(name, total=steps, now="")
            progress.update(bars[name], completed=step, visible=step < steps, now=f"{parts}  {speed:,.0f} examples/s")

        def follow() -> None:
            with suppress(RayError):  # the cluster is gone; whoever waits for the students says so
                while (message := messages.get()) is not None:
                    match message:
                        case ("line", text):
                            say(text)
                        case ("step", name, step, losses, speed):
                            show(name, step, losses, speed)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield messages
        finally:
            with suppress(RayError):
                messages.put(None)
                thread.join(timeout=5)
                messages.shutdown()
