"""Which artefacts a recipe leads to, and what determines the key of each.

A key holds what changes an artefact's content and nothing else: replicas, batch sizes of inference and
GPUs are left out, so that changing them never invalidates work that was paid for. Generations are keyed
apart from curation, so another way of filtering asks the teacher nothing.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.artifact import MANIFEST, Artifact, Store, fingerprint, make_key, open_artifact, open_path, open_store
from pipelines.deepspeed_config import read_config
from pipelines.errors import UserError
from pipelines.prompts import prompt_hash, stop_strings
from pipelines.recipe import BUILTIN, Recipe, Run, Split, resolve
from pipelines.tasks import Task, load_task

MODEL = "model"  # the folder of the student within a train artefact
BUNDLE = "bundle"  # the folder of the bundle within an export artefact
BEST = "best"  # while it is trained: the folder of the weights that were best so far
ROWS = "rows"  # the folder of the texts within a generations artefact
_PROMPTING = {"instruction", "prompt", "exemplars", "stop", "description", "hint"}
# arguments of vLLM's engine that change how fast it writes, and not what
_ENGINE_RESOURCES = {
    "block_size",
    "cpu_offload_gb",
    "disable_log_stats",
    "distributed_executor_backend",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_parallel_loading_workers",
    "num_gpu_blocks_override",
    "pipeline_parallel_size",
    "tensor_parallel_size",
}
_STUDENT_RESOURCES = {
    "checkpoint_every",
    "checkpoint_minutes",
    "checkpoints_kept",
    "cpus",
    "gpus",
    "gradient_accumulation",
    "local_files_only",
    "max_failures",
    "node_labels",
    "price",
    "trackers",
    "workers",
    "zero_stage",
}


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
        near = None if source.near_duplicates == "keep" else [source.near_duplicates, source.near_duplicate_similarity]
        return self._artifact("examples", self.task.model_dump(exclude=_PROMPTING), files, source.limit, near)

    @cached_property
    def generations(self) -> Artifact:
        """The teacher's texts.

        Texts of a teacher that is asked are found by row_id, so the key leaves out which rows are asked for:
        further rows, splits or samples are added to what is there.
        """
        teacher = self.recipe.teacher
        if teacher.engine == "outputs":
            given = {
                split: [fingerprint(p) for p in self.output_files(path)] for split, path in teacher.outputs.items()
            }
            return self._artifact("generations", self.examples.key, given)
        return self._generations(self._sampling(), hinted=False)

    @cached_property
    def hinted(self) -> Artifact:
        """The teacher's texts for rows that it got wrong, with the gold label told."""
        return self._generations(self._sampling(), hinted=True)

    @cached_property
    def retries(self) -> list[Artifact]:
        """Texts that `--retry-rejected` asked for anew, pass by pass; only passes that are whole."""
        if self.recipe.teacher.engine == "outputs":
            return []
        passes = (self.retry(number) for number in range(1, self.recipe.teacher.max_retries + 1))
        return list(itertools.takewhile(Artifact.done, passes))

    def retry(self, number: int) -> Artifact:
        """The artefact of a retry pass, counted from 1."""
        return self._artifact("generations", self.generations.key, "retry", number, self.retry_sampling(number))

    def retry_sampling(self, number: int) -> dict[str, Any]:
        """What a retry pass changes of the teacher's sampling."""
        teacher = self.recipe.teacher
        return {"temperature": teacher.retry_temperature, "seed": teacher.seed + number}

    @property
    def paid(self) -> list[Artifact]:
        """The texts that the teacher was asked for: at first, again, and with the gold label told."""
        return [self.generations, *self.retries, *([self.hinted] if self.hinted.done() else [])]

    @property
    def asked(self) -> list[Split]:
        """The splits that the teacher is asked for and that the source has.

        Raises:
            UserError: there is none.
        """
        teacher, given = self.recipe.teacher, self.recipe.source.files()
        wanted = list(teacher.outputs) if teacher.engine == "outputs" else list(teacher.splits)
        asked = [split for split in given if split in wanted]
        if not asked:
            raise UserError(f"teacher: none of the splits {', '.join(wanted)} is in the source ({', '.join(given)})")
        return asked

    @cached_property
    def rationales(self) -> Artifact:
        """What of them can be learnt from, and what can't."""
        curate = self.recipe.curate.model_dump(exclude={"max_reject_share"})
        texts = [self.generations, *self.retries] + ([self.hinted] if curate["on_disagree"] == "rationalize" else [])
        return self._artifact(
            "rationales",
            self.examples.key,
            [artifact.key for artifact in texts],
            self.asked,
            self.recipe.teacher.samples,
            stop_strings(self.task, self.recipe.teacher.prompt),  # given outputs are cut by them too
            curate,
        )

    @cached_property
    def dataset(self) -> Artifact:
        """Training rows and splits."""
        held_out = None if self.recipe.source.validation else self.recipe.source.validation_share
        further = [artifact.key for artifact in self.further_rationales]
        return self._artifact("dataset", self.rationales.key, further, held_out)

    @cached_property
    def further_rationales(self) -> list[Artifact]:
        """The rationales of other recipes that the dataset takes up.

        Raises:
            UserError: one of them is no finished rationales artefact.
        """
        artifacts = []
        for folder in self.recipe.dataset.rationales:
            artifact = open_artifact(folder)
            if artifact.stage != "rationales":
                raise UserError(
                    f"dataset.rationales: {folder} is of stage {artifact.stage}; give one of stage rationales"
                )
            artifacts.append(artifact)
        return artifacts

    def student(self, run: Run) -> Artifact:
        """One trained student.

        Raises:
            UserError: its model is not there, or the task has not its metric.
        """
        student = self.recipe.student_of(run)
        if student.metric == "macro_f1" and self.task.answer.kind != "choice":
            raise UserError(
                f"student.metric macro_f1 needs a closed set of labels, and answers of task {self.task.name} are of "
                f"kind {self.task.answer.kind}; take accuracy"
            )
        settings = student.model_dump(exclude=_STUDENT_RESOURCES | {"model", "revision", "deepspeed"})
        model = self._identity(student.model, student.revision)
        given = read_config(student.deepspeed) if student.deepspeed else None
        drawn = run.model_dump(exclude={"alpha", "model"}, exclude_none=True)  # those two are among the settings
        return self._artifact("train", self.dataset.key, model, settings, given, drawn)

    def evaluation(self, run: Run) -> Artifact:
        """One student's predictions on a split, and its metrics."""
        evaluate = self.recipe.evaluate
        return self._artifact("evaluate", self.student(run).key, evaluate.split, evaluate.resamples)

    @cached_property
    def search(self) -> Artifact:
        """Which students the search chose, and what it tried."""
        search = self.recipe.search
        trials = [self.student(run).key for run in search.points()]
        how = search.model_dump(include={"stop_early", "grace_looks", "reduction_factor"})
        return self._artifact("search", trials, how, self.recipe.evaluate.split)

    def report(self, chosen: Sequence[Run] | None = None) -> Artifact:
        """Tables and figures over the students that the search chose; by default, over those of the recipe's `runs`."""
        runs = self.recipe.students() if chosen is None else chosen
        searched = None if chosen is None else self.search.key  # what it tried is told, too
        prices = [self.recipe.teacher.price.model_dump(), self.recipe.student.price.model_dump()]
        return self._artifact("report", [self.evaluation(run).key for run in runs], searched, prices)

    @cached_property
    def export(self) -> Artifact:
        """The bundle of the student that is best on validation."""
        students = [self.student(run).key for run in self.recipe.students()]
        return self._artifact("export", students, self.recipe.evaluate.split, self.recipe.export.model_dump())

    def check(self, runs: Sequence[Run]) -> None:
        """What a late stage would find at fault, before the teacher is paid.

        Raises:
            UserError: a file or model is not there, or there is nothing to choose or score students on.
        """
        for run in runs:
            _ = self.evaluation(run)  # its key holds the keys of all stages before
        source, split = self.recipe.source, self.recipe.evaluate.split
        if not (source.train or source.validation):
            raise UserError(
                "source has neither train nor validation, and a student's checkpoint is chosen on gold labels"
            )
        if split == "test" and not source.test:
            raise UserError("source.test is not given; give it, or set evaluate.split to validation")

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

    def reads_of_test(self) -> list[dict[str, str]]:
        """Every time that a student of this storage was scored on the test split, by the manifests that are there."""
        fs, root = open_path(f"{self.store.root}/evaluate")
        folders = fs.ls(root, detail=False) if fs.exists(root) else []
        manifests = [
            open_artifact(fs.unstrip_protocol(folder)).manifest()
            for folder in folders
            if fs.exists(f"{folder}/{MANIFEST}")
        ]
        reads = [
            {"student": Run.model_validate(m["run"]).name, "evaluation": m["key"], "at": m["finished"]}
            for m in manifests
            if m["split"] == "test"
        ]
        return sorted(reads, key=lambda read: read["at"])

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

    def _sampling(self) -> dict[str, Any]:
        teacher = self.recipe.teacher
        sampling = teacher.model_dump(include={"temperature", "top_p", "max_tokens", "dtype"})
        sampling["engine_args"] = {k: v for k, v in teacher.engine_args.items() if k not in _ENGINE_RESOURCES}
        if teacher.temperature > 0:
            sampling["seed"] = teacher.seed
        return sampling

    def _generations(self, sampling: dict[str, Any], hinted: bool) -> Artifact:
        teacher, task = self.recipe.teacher, self.task
        served = teacher.engine == "openai"  # by a name that the endpoint knows
        return self._artifact(
            "generations",
            task.name,
            teacher.engine,
            teacher.model if served else model_identity(teacher.model, teacher.revision),
            prompt_hash(task, teacher.prompt, teacher.rationale_length, hinted),
            stop_strings(task, teacher.prompt),
            teacher.chat_template_args,
            task.answer.model_dump() if teacher.constrain_answer else None,
            self.examples.key if hinted else None,  # whose gold labels were told
            sampling,
        )

    def _identity(self, model: str, revision: str | None) -> str:
        """`model_identity`, read once: a search has many students of one model."""
        if (model, revision) not in self._identities:
            self._identities[model, revision] = model_identity(model, revision)
        return self._identities[model, revision]

    @cached_property
    def _identities(self) -> dict[tuple[str, str | None], str]:
        return {}

    def _artifact(self, stage: str, *content: object) -> Artifact:
        return self.store.artifact(stage, make_key(stage, *content))


def model_identity(model: str, revision: str | None) -> str:
    """A model by the content of its directory, or by its Hugging Face id and revision.

    Raises:
        UserError: the name looks like a path and nothing is there.
    """
    path = resolve(model)
    fs, root = open_path(path)
    try:
        found = fs.exists(root)
    except Exception as error:  # whatever the storage's package raises: no credentials, no such host
        raise UserError(f"model {model!r}: can't be reached: {' '.join(str(error).split())}") from error
    if found:
        return fingerprint(path)
    if model.startswith((BUILTIN, ".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"model {model!r}: no such directory; give a Hugging Face id or a folder with config.json")
    return f"{model}@{revision or 'main'}"


def _numeric(path: str) -> list[tuple[int, int | str]]:
    """Sorts `x_2.json` before `x_10.json`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path)]
