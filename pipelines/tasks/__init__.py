"""Tasks: what a row is, how a teacher is asked and how an answer is read and judged."""

from pipelines.tasks.task import Answer, Exemplar, Task, load_task

__all__ = ["Answer", "Exemplar", "Task", "load_task"]
