"""Which artefacts a recipe leads to, and what determines the key of each.

A key holds what changes an artefact's content and nothing else: replicas, batch sizes of inference and
GPUs are left out, so that changing them never invalidates work that was paid for. Generations are keyed
apart from curation, so another way of filtering asks the teacher nothing.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.artifact import Artifact, Store, fingerprint, make_key, open_path, open_store
from pipelines.errors import UserError
from pipelines.prompts import prompt_hash, stop_strings
from pipelines.recipe import BUILTIN, Recipe, Run, resolve
from pipelines.tasks import Task, load_task

MODEL = "model"  # the folder of the student within a train artefact
_PROMPTING = {"instruction", "prompt", "exemplars", "stop", "description"}
_STUDENT_RESOURCES = {"workers", "gpus", "cpus"}


@dataclass(frozen=True)
class Lineage:
    """The artefacts of one recipe."""

    recipe: Recipe

    @cached_property
    def task(self) -> Task:
        return load_task(self.recipe.task)

    @cached_property
    def store(self) -> Store:
        return open_store(self.recipe.storage, self.recipe.name)

    @cached_property
    def examples(self) -> Artifact:
        """The source's rows, read once."""
        source = self.recipe.source
        files = {split: fingerprint(path) for split, path in source.files().items()}
        return self._artifact("examples", self.task.model_dump(exclude=_PROMPTING), files, source.limit)

    @cached_property
    def generations(self) -> Artifact:
        """The teacher's texts."""
        teacher = self.recipe.teacher
        if teacher.engine == "outputs":
            given = {
                split: [fingerprint(p) for p in self.output_files(path)] for split, path in teacher.outputs.items()
            }
            return self._artifact("generations", self.examples.key, given)
        sampling = teacher.model_dump(include={"temperature", "top_p", "max_tokens", "dtype", "engine_args"})
        if teacher.temperature > 0:
            sampling["seed"] = teacher.seed
        return self._artifact(
            "generations",
            self.examples.key,
            sorted(teacher.splits),
            prompt_hash(self.task),
            stop_strings(self.task),
            model_identity(teacher.model, teacher.revision),
            sampling,
        )

    @cached_property
    def rationales(self) -> Artifact:
        """What of them can be learnt from, and what can't."""
        reading = stop_strings(self.task)  # given outputs are cut by them too, though no teacher was asked with them
        return self._artifact("rationales", self.generations.key, reading, self.recipe.curate.model_dump())

    @cached_property
    def dataset(self) -> Artifact:
        """Training rows and splits."""
        held_out = None if self.recipe.source.validation else self.recipe.source.validation_share
        return self._artifact("dataset", self.rationales.key, held_out)

    def student(self, run: Run) -> Artifact:
        """One trained student."""
        settings = self.recipe.student.model_dump(exclude=_STUDENT_RESOURCES | {"model", "revision"})
        model = model_identity(self.recipe.student.model, self.recipe.student.revision)
        return self._artifact("train", self.dataset.key, model, settings, run.model_dump())

    def evaluation(self, run: Run) -> Artifact:
        """One student's predictions on a split, and its metrics."""
        evaluate = self.recipe.evaluate
        return self._artifact("evaluate", self.student(run).key, evaluate.split, evaluate.resamples)

    @cached_property
    def report(self) -> Artifact:
        """Tables and figures over all students of the recipe."""
        return self._artifact("report", [self.evaluation(run).key for run in self.recipe.students()])

    def require(self, artifact: Artifact, command: str) -> Artifact:
        """A parent that must be there already.

        Raises:
            UserError: it is not; the sentence says which command makes it.
        """
        if not artifact.done():
            raise UserError(
                f"{artifact.uri}: not there yet; run `distill {command}` first, with the same recipe and settings"
            )
        return artifact

    def output_files(self, pattern: str) -> list[str]:
        """The files of `teacher.outputs` that a path or glob names, numbered parts in numeric order."""
        located = self.recipe.source.locate(pattern)
        fs, path = open_path(located)
        files = sorted(fs.glob(path), key=_numeric)
        if not files:
            raise UserError(f"teacher.outputs: no file matches {located}")
        return [fs.unstrip_protocol(f) for f in files]

    def snapshot(self) -> dict[str, Any]:
        """The resolved recipe, for a manifest."""
        return self.recipe.model_dump(mode="json")

    def _artifact(self, stage: str, *content: object) -> Artifact:
        return self.store.artifact(stage, make_key(stage, *content))


def model_identity(model: str, revision: str | None) -> str:
    """A model by the content of its directory, or by its Hugging Face id and revision.

    Raises:
        UserError: the name looks like a path and nothing is there.
    """
    path = resolve(model)
    fs, root = open_path(path)
    if fs.exists(root):
        return fingerprint(path)
    if model.startswith((BUILTIN, ".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"model {model!r}: no such directory; give a Hugging Face id or a folder with config.json")
    return f"{model}@{revision or 'main'}"


def _numeric(path: str) -> list[tuple[int, int | str]]:
    """Sorts `x_2.json` before `x_10.json`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path)]
