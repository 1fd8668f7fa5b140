"""The recipe: one typed, frozen YAML for a whole run. Unknown keys are errors; every key has a default."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipelines.errors import UserError, explain_invalid

PACKAGE = Path(__file__).parent
SHIPPED = PACKAGE / "recipes"
BUILTIN = "builtin:"

Arm = Literal["standard", "step_by_step", "rationale_first", "label_first", "shuffled_rationale"]
TWO_TASKS: tuple[Arm, ...] = ("step_by_step", "shuffled_rationale")
ONE_TARGET: tuple[Arm, ...] = ("rationale_first", "label_first")
LabelSource = Literal["gold", "teacher"]
Split = Literal["train", "validation", "test", "unlabelled"]


def _as_list(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


_NODES = "only on nodes of a cluster that bear these labels, e.g. {ray-subcluster: teacher}"
_T = TypeVar("_T")
_OneOrMore = Annotated[tuple[_T, ...], Field(min_length=1), BeforeValidator(_as_list)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Frozen):
    """Where the examples are. JSON lines, a JSON array, CSV or Parquet; told by the name's ending."""

    root: str = Field(default="", description="folder (or URI) before every relative path of the recipe's data")
    train: str | None = None
    validation: str | None = Field(default=None, description="without it, a share of train is held out by row_id")
    test: str | None = None
    unlabelled: str | None = Field(default=None, description="inputs without gold labels")
    limit: int | None = Field(default=None, ge=1, description="at most so many rows of each split, the first ones")
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    near_duplicates: Literal["keep", "drop_leaks", "drop"] = Field(
        default="drop_leaks",
        description="inputs that nearly repeat another: drop_leaks removes rows of train and unlabelled that nearly "
        "stand in validation or test; drop also those that nearly repeat an earlier row of their own",
    )
    near_duplicate_similarity: float = Field(default=0.9, gt=0.5, le=1, description="Jaccard, of runs of three words")

    @model_validator(mode="after")
    def _some_rows(self) -> Self:
        if not (self.train or self.unlabelled):
            raise ValueError("give `train` or `unlabelled`, otherwise there is nothing to distil")
        return self

    def locate(self, path: str) -> str:
        """A path of the recipe's data, with `root` before it and `builtin:` resolved."""
        if path.startswith(BUILTIN) or "://" in path or Path(path).is_absolute() or not self.root:
            return resolve(path)
        return f"{resolve(self.root).rstrip('/')}/{path}"

    def files(self) -> dict[Split, str]:
        """Split name -> located path, for the splits given."""
        given: dict[Split, str | None] = {
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
            "unlabelled": self.unlabelled,
        }
        return {split: self.locate(path) for split, path in given.items() if path}


class Endpoint(_Frozen):
    """An OpenAI-style HTTP server that answers for the teacher."""

    url: str = Field(
        description="up to /v1, e.g. http://teacher:8000/v1; a key has no place in it",
        pattern=r"^https?://(\[[0-9a-fA-F:]+\]|[^\s/@:?#]+)(:\d{1,5})?(/[^\s?#]*)?$",
    )
    api_key_env: str = Field(
        default="DISTILL_TEACHER_API_KEY", description="the environment variable that holds the key, on every node"
    )
    concurrency: int = Field(default=64, ge=1, le=1000, description="requests under way at once")
    requests_per_minute: int | None = Field(default=None, ge=1)
    timeout_s: float = Field(default=120, gt=0, description="of one request")
    retries: int = Field(default=6, ge=0, description="on 429, 5xx and timeouts, with growing pauses")


class Price(_Frozen):
    """What the teacher costs, in your currency."""

    replica_hour: float = Field(default=0, ge=0, description="an hour of one engine, all its GPUs")
    million_input_tokens: float = Field(default=0, ge=0)
    million_output_tokens: float = Field(default=0, ge=0)


class Teacher(_Frozen):
    """Who writes the rationales, and with what resources."""

    engine: Literal["vllm", "openai", "outputs"] = "vllm"
    model: str = Field(default="builtin:quickstart/teacher", description="Hugging Face id, local directory or builtin:")
    revision: str | None = None
    splits: tuple[Split, ...] = Field(
        default=("train", "unlabelled", "test"), description="test only to know the teacher's own accuracy"
    )
    outputs: dict[Split, str] = Field(
        default={}, description="for engine outputs: split -> file or glob of the texts that you have"
    )
    endpoint: Endpoint | None = Field(default=None, description="for engine openai")
    prompt: Literal["completion", "chat"] = Field(
        default="completion", description="chat: exemplars as turns, through the model's own chat template"
    )
    chat_template_args: dict[str, Any] = Field(default={}, description="e.g. {enable_thinking: false}")
    rationale_length: Literal["short", "medium", "full"] = Field(
        default="full", description="which form of the exemplars' rationales stands in the prompt"
    )
    constrain_answer: bool = Field(
        default=False, description="force the answer sentence and a label of the set, by structured outputs"
    )
    samples: int = Field(default=1, ge=1, le=100, description="texts of one row; their labels vote")
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=256, ge=1, description="new tokens at most; a longer text is rejected as truncated")
    seed: int = 0
    retry_temperature: float = Field(default=0.7, gt=0, description="of --retry-rejected")
    max_retries: int = Field(default=3, ge=0, description="how often --retry-rejected may ask again")
    # resources: these never change what is written, so they are not part of a key
    replicas: tuple[int, int] = Field(default=(1, 1), description="[min, max] engines")
    gpus: int = Field(default=0, ge=0, description="GPUs of one engine; 0 runs vLLM's CPU build")
    pipeline_parallel: int = Field(default=1, ge=1, description="stages of one engine; the rest of gpus splits tensors")
    cpus: float = Field(default=1, gt=0, description="CPUs of one engine")
    node_labels: dict[str, str] = Field(default={}, description=_NODES)
    batch_size: int = Field(default=256, ge=1, description="rows that one engine has under way; a kill loses no more")
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    kv_cache_gb: float = Field(default=1.0, gt=0, description="KV cache of one engine on CPU, GiB")
    engine_args: dict[str, Any] = Field(default={}, description="further arguments of vLLM's engine")
    price: Price = Price()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine == "outputs" and not self.outputs:
            raise ValueError("engine outputs needs `outputs`, e.g. {train: 'llm/train_CoT_*.json'}")
        if (self.engine == "openai") != (self.endpoint is not None):
            raise ValueError(
                "engine openai needs `endpoint`, e.g. {url: http://localhost:8000/v1}, and no other takes it"
            )
        low, high = self.replicas
        if not 1 <= low <= high:
            raise ValueError(f"replicas must be [min, max] with 1 <= min <= max, not [{low}, {high}]")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature above 0, otherwise all say the same")
        if self.gpus % self.pipeline_parallel and self.gpus:
            raise ValueError(f"gpus {self.gpus} must be a multiple of pipeline_parallel {self.pipeline_parallel}")
        return self


class Curate(_Frozen):
    """Which rationales a student may learn from."""

    on_disagree: Literal["drop", "keep", "rationalize"] = Field(
        default="drop", description="the teacher's label is not the gold one; rationalize asks again, with gold told"
    )
    thinking: Literal["strip", "rationale"] = Field(
        default="strip", description="what becomes of the thinking part of a reasoning model"
    )
    min_words: int = Field(default=3, ge=0, description="shorter rationales are rejected as too_short")
    max_words: int | None = Field(default=None, ge=1, description="longer rationales are rejected as too_long")
    min_agreement: float = Field(
        default=0.0, ge=0, le=1, description="share of a row's samples that its label needs; fewer are outvoted"
    )
    max_reject_share: float = Field(
        default=0.95, gt=0, le=1, description="a run stops early when more than this share of its texts is rejected"
    )


class Budget(_Frozen):
    """What asking the teacher may cost; a run that reaches a limit stops, and goes on when it is raised."""

    max_rows: int | None = Field(default=None, ge=1, description="texts asked for")
    max_tokens: int | None = Field(default=None, ge=1, description="input and output tokens together")
    max_gpu_hours: float | None = Field(
        default=None, gt=0, description="GPU hours; of an engine without GPU, its hours"
    )


class Dataset(_Frozen):
    """What training rows are made of."""

    rationales: tuple[str, ...] = Field(
        default=(), description="further rationales artefacts of the same task, e.g. of other teachers: their folders"
    )


class StudentPrice(_Frozen):
    """What a student costs, in your currency."""

    worker_hour: float = Field(default=0, ge=0, description="an hour of one worker of training, its GPU included")
    replica_hour: float = Field(default=0, ge=0, description="an hour of one replica that answers")


class Student(_Frozen):
    """The student and how it is trained."""

    model: str = Field(default="builtin:quickstart/student", description="Hugging Face id, local directory or builtin:")
    revision: str | None = None
    local_files_only: bool = Field(default=False, description="never look for the model on the hub")
    init: Literal["pretrained", "random"] = Field(
        default="pretrained", description="random keeps only shape and tokenizer"
    )
    # the method
    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="alpha * label loss + (1 - alpha) * rationale loss; `lambda` may stand instead, the paper's "
        "label loss + lambda * rationale loss, and becomes alpha = 1 / (1 + lambda)",
    )
    prefix: Literal["encoder", "decoder"] = Field(
        default="encoder",
        description="where the student is told its task; decoder is another method than the paper's: both tasks "
        "share one encoder pass",
    )
    rationales: Literal["first", "draw", "per_teacher"] = Field(
        default="first",
        description="of a row with several: the first; one drawn anew each epoch; or one of each teacher, a task each",
    )
    weigh_by_agreement: bool = Field(
        default=False, description="what teachers say counts by the share of a row's samples that agree with it"
    )
    # the optimisation
    learning_rate: float = Field(default=5e-5, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    batch_size: int = Field(default=64, ge=1, description="examples a step, over all workers")
    batch_by_length: bool = Field(
        default=False, description="rows of like length share a batch: faster; an epoch sees each row once as before"
    )
    steps: int = Field(default=10_000, ge=1)
    eval_every: int = Field(default=500, ge=1, description="steps between two looks at validation")
    metric: Literal["accuracy", "macro_f1"] = Field(
        default="accuracy",
        description="on validation, what the best weights, early stopping and the search go by; macro_f1, of closed "
        "sets alone, counts rare labels as much as others",
    )
    patience: int | None = Field(default=None, ge=1, description="stop after so many looks without a better score")
    max_input_tokens: int = Field(default=1024, ge=8)
    max_target_tokens: int = Field(default=256, ge=4)
    dropout: float | None = Field(default=None, ge=0, lt=1, description="default: the model's own")
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="T5 overflows in fp16, so that is not offered"
    )
    deepspeed: str | None = Field(
        default=None, description="a DeepSpeed config (JSON), for what this recipe has no key for; `auto` is filled in"
    )
    # resources, and what else leaves the student as it is
    zero_stage: Literal[0, 1, 2, 3] = 1
    workers: int = Field(default=1, ge=1)
    gpus: int = Field(default=0, ge=0, le=1, description="GPUs of one worker")
    cpus: float = Field(default=1, gt=0, description="CPUs of one worker")
    node_labels: dict[str, str] = Field(default={}, description=_NODES)
    gradient_accumulation: int = Field(default=1, ge=1, description="parts that a worker takes its batch in")
    checkpoint_every: int = Field(default=500, ge=1, description="steps between two checkpoints to continue from")
    checkpoint_minutes: float | None = Field(default=None, gt=0, description="at most so long between two checkpoints")
    checkpoints_kept: int = Field(default=2, ge=1, description="the newest ones; the best weights are kept besides")
    max_failures: int = Field(default=3, ge=0, description="restarts from the last checkpoint within one run")
    trackers: tuple[Literal["mlflow", "wandb"], ...] = Field(
        default=(), description="besides TensorBoard; set up by their own environment variables"
    )
    price: StudentPrice = StudentPrice()

    @model_validator(mode="before")
    @classmethod
    def _lambda(cls, given: Any) -> Any:
        """alpha from the paper's lambda: the losses differ by a factor, which Adam does not see."""
        if not isinstance(given, dict) or "lambda" not in given:
            return given
        rest = {key: value for key, value in given.items() if key != "lambda"}
        weight = given["lambda"]
        if "alpha" in rest:
            raise ValueError("alpha and lambda say the same thing; give one of the two")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
            raise ValueError(f"lambda must be a number from 0 on, not {weight!r}")
        return {**rest, "alpha": 1 / (1 + weight)}

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp16(cls, given: object) -> object:
        if given in ("fp16", "float16"):
            raise ValueError("T5's activations overflow in fp16 and the loss becomes NaN; take bf16 or fp32")
        return given

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        parts = self.workers * self.gradient_accumulation
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of workers * gradient_accumulation, {parts}"
            )
        return self


class Run(_Frozen):
    """One student to train: a point of the grid."""

    arm: Arm
    labels: LabelSource = "gold"
    fraction: float = Field(default=1.0, gt=0, le=1)
    alpha: float | None = Field(default=None, ge=0, le=1)  # None: student.alpha
    model: str | None = None  # None: student.model
    teacher: str | None = None  # None: all that the dataset has something of
    seed: int = 0

    @property
    def name(self) -> str:
        """E.g. `step_by_step-gold-0.25-seed0`; with alpha, model and teacher where the run has its own."""
        own = [] if self.alpha is None else [f"alpha{self.alpha:.4g}"]
        own += [short_name(path) for path in (self.model, self.teacher) if path is not None]
        return "-".join([self.arm, self.labels, f"{self.fraction:.4g}", *own, f"seed{self.seed}"])


class Grid(_Frozen):
    """Students to train: every combination of the values given; one value may stand without brackets."""

    arm: _OneOrMore[Arm] = ("standard", "step_by_step")
    labels: _OneOrMore[LabelSource] = ("gold",)
    fraction: _OneOrMore[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=(1.0,), description="share of the labelled rows; smaller ones lie within larger ones"
    )
    alpha: _OneOrMore[Annotated[float, Field(ge=0, le=1)] | None] = Field(
        default=(None,), description="instead of student.alpha, for the arms that have two tasks"
    )
    model: _OneOrMore[str | None] = Field(default=(None,), description="instead of student.model")
    teacher: _OneOrMore[str | None] = Field(
        default=(None,),
        description="of several that the dataset has rationales of, the one to learn from; by its model",
    )
    seed: _OneOrMore[int] = (0,)

    def runs(self) -> list[Run]:
        points = itertools.product(
            self.labels, self.fraction, self.model, self.teacher, self.arm, self.alpha, self.seed
        )
        return [
            Run(
                arm=arm,
                labels=labels,
                fraction=fraction,
                alpha=alpha if arm in TWO_TASKS else None,
                model=model,
                teacher=None if (arm, labels) == ("standard", "gold") else teacher,  # it learns from none
                seed=seed,
            )
            for labels, fraction, model, teacher, arm, alpha, seed in points
        ]


class Search(_Frozen):
    """What `distill search` tries; alpha is chosen on validation, over seeds, all else being equal."""

    space: tuple[Grid, ...] = Field(
        default=(Grid(alpha=(0.25, 0.5, 0.75), fraction=(0.125, 0.25, 0.5, 0.75, 1.0), seed=(0, 1, 2)),), min_length=1
    )
    preset: Literal["full", "small"] = Field(
        default="full", description="small: of each part of the space the least and the largest fraction, one seed"
    )
    sample: int | None = Field(default=None, ge=1, description="so many points drawn at random, instead of all")
    stop_early: bool = Field(
        default=True, description="by ASHA: of students that differ in alpha alone, the worse ones end early"
    )
    grace_looks: int = Field(default=1, ge=1, description="looks at validation before one may be stopped")
    reduction_factor: float = Field(default=2, gt=1, description="of those that are looked at, one in so many goes on")
    retries: int = Field(default=1, ge=0, description="of a trial that fails")
    max_trials: int | None = Field(default=None, ge=1)
    max_hours: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _one_grid(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("space"), dict):
            return {**given, "space": [given["space"]]}
        return given

    def points(self) -> list[Run]:
        """The students to try, in order, each once."""
        grids = self.space
        if self.preset == "small":
            outer = [sorted({min(grid.fraction), max(grid.fraction)}) for grid in grids]
            grids = tuple(
                grid.model_copy(update={"fraction": tuple(fractions), "seed": grid.seed[:1]})
                for grid, fractions in zip(grids, outer, strict=True)
            )
        points = list(dict.fromkeys(run for grid in grids for run in grid.runs()))
        if self.sample is not None and self.sample < len(points):
            drawn = set(random.Random(0).sample(range(len(points)), self.sample))
            points = [point for number, point in enumerate(points) if number in drawn]
        return points[: self.max_trials]


class Evaluate(_Frozen):
    """How students are scored."""

    split: Literal["validation", "test"] = "test"
    batch_size: int = Field(default=64, ge=1)
    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=1, gt=0)
    gpus: int = Field(default=0, ge=0)
    node_labels: dict[str, str] = Field(default={}, description=_NODES)
    resamples: int = Field(default=2000, ge=100, description="of the bootstrap")


class Export(_Frozen):
    """What the bundle to serve is made with."""

    abstain_below: float = Field(default=0.0, ge=0, le=1, description="calibrated confidence that an answer needs")
    answered_accuracy: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="choose abstain_below so that on validation so large a share of the answers given is right",
    )
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        default="auto", description="auto: the fastest that this processor has and whose answers agree with fp32"
    )
    agreement: float = Field(
        default=0.995, gt=0, le=1, description="share of validation on which bf16 and int8 must answer as fp32 does"
    )

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if self.abstain_below and self.answered_accuracy:
            raise ValueError("abstain_below and answered_accuracy both set the threshold; give one of the two")
        return self


class Recipe(_Frozen):
    """Everything that a run is made of."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")  # a folder's name, so not `..`
    storage: str = Field(default="runs", description="a folder, or a URI such as s3://bucket/prefix")
    task: str = Field(description="a shipped task's name, or a path to your own task file")
    source: Source
    teacher: Teacher = Teacher()
    curate: Curate = Curate()
    budget: Budget = Budget()
    dataset: Dataset = Dataset()
    student: Student = Student()
    runs: tuple[Grid, ...] = (Grid(),)
    search: Search = Search()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.teacher.engine == "outputs" and self.curate.on_disagree == "rationalize":
            raise ValueError("curate.on_disagree rationalize asks the teacher again, which engine outputs can't be")
        one_target = sorted({run.arm for run in self.students()} & set(ONE_TARGET))
        if one_target and self.student.rationales == "per_teacher":
            raise ValueError(
                f"student.rationales per_teacher needs a task for each; arm {one_target[0]} has one target"
            )
        if one_target and self.student.prefix == "decoder":
            raise ValueError(f"student.prefix decoder tells two tasks apart; arm {one_target[0]} has one")
        return self

    def students(self) -> list[Run]:
        """The students to train, in order, each once."""
        return list(dict.fromkeys(run for grid in self.runs for run in grid.runs()))

    def student_of(self, run: Run) -> Student:
        """The settings of one student: a run's own alpha and model take the place of `student`'s."""
        own: dict[str, Any] = {} if run.alpha is None else {"alpha": run.alpha}
        if run.model is not None:
            own |= {"model": run.model, "revision": None}
        return self.student.model_copy(update=own)


def short_name(path: str) -> str:
    """The last part of a model's id or folder."""
    return path.rstrip("/").rpartition("/")[2]


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by the name of a shipped one or from a file, with `key.path=value` overrides.

    Values of overrides are YAML: `--set student.steps=200 --set runs='[{arm: standard}]'`.

    Raises:
        UserError: no such recipe, not YAML, an unknown key, a wrong type, a malformed override.
    """
    shipped = sorted(p.stem for p in SHIPPED.glob("*.yaml"))
    path = SHIPPED / f"{name_or_path}.yaml" if name_or_path in shipped else Path(name_or_path)
    if not path.is_file():
        raise UserError(f"recipe {name_or_path!r} is neither a file nor one of {', '.join(shipped)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping with name, task, source, …")
    for override in overrides:
        _apply(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(explain_invalid(str(path), Recipe, error)) from error


def resolve(path: str) -> str:
    """A path with `builtin:` replaced by the folder of this package, and `~` by the user's."""
    if path.startswith(BUILTIN):
        return str(PACKAGE / path.removeprefix(BUILTIN))
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write it as key.path=value")
    *parents, last = key.split(".")
    for parent in parents:
        if content.get(parent) is None:  # not there, or left empty in the file
            content[parent] = {}
        content = content[parent]
        if not isinstance(content, dict):
            raise UserError(f"--set {override}: {parent!r} is a value, not a group of keys")
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from error
