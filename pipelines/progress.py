"""How far students are, as their workers tell it: lines, on a terminal a bar a student, and metrics for Prometheus."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from pipelines.console import console, say


@contextmanager
def progress_of(recipe: str, steps: int) -> Iterator[Any]:
    """A queue that workers anywhere on the cluster put messages in, and what shows them.

    A message is `("line", student's key, text)`, `("step", student's name, step, losses, examples a second)` or
    `("look", student's name, accuracy on validation)`.
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
        metrics = Metrics(recipe)

        def show(name: str, step: int, losses: dict[str, float], speed: float) -> None:
            parts = "  ".join(f"{part.removesuffix('_loss')} {value:.3f}" for part, value in losses.items())
            if name not in bars:
                bars[name] = progress.add_task(name, total=steps, now="")
            progress.update(bars[name], completed=step, visible=step < steps, now=f"{parts}  {speed:,.0f} examples/s")

        def follow() -> None:
            with suppress(RayError):  # the cluster is gone; whoever waits for the students says so
                while (message := messages.get()) is not None:
                    match message:
                        case ("line", key, text):
                            say(text, stage="train", key=key)
                        case ("step", name, step, losses, speed):
                            show(name, step, losses, speed)
                            metrics.step(name, step, losses, speed)
                        case ("look", name, accuracy):
                            metrics.look(name, accuracy)

        thread = threading.Thread(target=copy_context().run, args=(follow,), daemon=True)  # its lines are about ours
        thread.start()
        try:
            yield messages
        finally:
            with suppress(RayError):
                messages.put(None)
                thread.join(timeout=5)
                messages.shutdown()


class Metrics:
    """Gauges at Ray's Prometheus endpoint, which puts `ray_` before their names."""

    def __init__(self, recipe: str) -> None:
        from ray.util.metrics import Gauge

        of_student = ("recipe", "student")
        self._step = Gauge("distill_step", "Steps that a student has taken", of_student)
        self._loss = Gauge("distill_loss", "A student's loss, and its parts", (*of_student, "part"))
        self._speed = Gauge("distill_examples_per_second", "Examples that a student learns from", of_student)
        self._accuracy = Gauge("distill_validation_accuracy", "A student's accuracy at its last look", of_student)
        for gauge in (self._step, self._loss, self._speed, self._accuracy):
            gauge.set_default_tags({"recipe": recipe})

    def step(self, student: str, step: int, losses: dict[str, float], speed: float) -> None:
        self._step.set(step, {"student": student})
        self._speed.set(speed, {"student": student})
        for part, value in losses.items():
            self._loss.set(value, {"student": student, "part": part.removesuffix("_loss")})

    def look(self, student: str, accuracy: float) -> None:
        self._accuracy.set(accuracy, {"student": student})
