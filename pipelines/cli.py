"""`distill`: one command a stage, and no logic."""

import errno
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from pipelines.artifact import Artifact
from pipelines.console import console, say, show_table
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.recipe import load_recipe

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

app = typer.Typer(
    name="distill",
    help="Distil a large teacher into small T5 students, step by step.\n\n"
    "Start with `distill demo`; then `distill run RECIPE` with your own recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's path, or the name of a shipped one.")]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. --set student.steps=200. Repeatable."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Do it again, though it is done.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Last line on stdout: one JSON object of what was made.")]
AddressOption = Annotated[
    str | None, typer.Option(metavar="URL", help="The cluster's dashboard, e.g. http://head:8265.", show_default=False)
]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="As `distill submit` told it.")]
OnCluster = Literal["run", "rationales", "dataset", "train", "evaluate", "search", "report", "export"]

job_app = typer.Typer(help="Jobs on a cluster: how they stand, what they say.", no_args_is_help=True)
app.add_typer(job_app, name="job")


@app.command()
def demo(set_: SetOption = [], force: ForceOption = False, json_: JsonOption = False) -> None:
    """Run the shipped quickstart from source to report: no download, two CPU cores."""
    run("quickstart", set_, force, json_)


@app.command()
def run(recipe: RecipeArgument, set_: SetOption = [], force: ForceOption = False, json_: JsonOption = False) -> None:
    """Run the whole chain: rationales, dataset, train, evaluate, report."""

    def work(line: Lineage) -> list[Artifact]:
        from pipelines.chain import run_chain

        return [run_chain(line, force)]

    _stage(recipe, set_, json_, work)


@app.command()
def init(
    file: Annotated[str, typer.Argument(metavar="FILE", help="CSV, TSV, JSON, JSON lines or Parquet.")],
    input_: Annotated[list[str], typer.Option("--input", metavar="COLUMN", help="What is read. Repeatable.")] = [],
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="The gold label.")] = None,
    labels: Annotated[
        str, typer.Option(metavar="A,B,C", help="All answers; or the names of 0, 1, 2 …, in order.")
    ] = "",
    folder: Annotated[str, typer.Option(help="Where the two files go.")] = ".",
    name: Annotated[str | None, typer.Option(help="The task's name; by default the file's.")] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Let this model propose the exemplars' rationales, with vLLM.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of one engine of the teacher.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
    json_: JsonOption = False,
) -> None:
    """Look at a file of your own; write a task file and a recipe for it, to be read and mended."""
    _quiet(json_)
    from pipelines.init import init_project
    from pipelines.teacher import proposer

    with proposer(teacher, gpus) as propose:
        known = labels.split(",") if labels else ()
        made = init_project(file, input_, label, folder, name, known, teacher, propose, gpus, force)
    if json_:
        _print_json(asdict(made))


@app.command()
def preview(
    recipe: RecipeArgument,
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
    set_: SetOption = [],
    json_: JsonOption = False,
) -> None:
    """Show a few rows: the prompt, the teacher's raw text, and what was read from it or why not."""
    line = _load(recipe, set_, json_)
    from pipelines.preview import preview as show

    made = show(line, rows)
    if json_:
        _print_json({"recipe": line.recipe.name, "rows": made})


@app.command()
def plan(
    recipe: RecipeArgument,
    rows: Annotated[int | None, typer.Option(min=1, help="Texts to generate as a sample; they are kept.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=0, help="Rows a second of one engine; then none is generated.")
    ] = None,
    set_: SetOption = [],
    json_: JsonOption = False,
) -> None:
    """Tell what asking the teacher will take: rows, tokens, hours, money, with a range, before it is paid."""
    line = _load(recipe, set_, json_)
    from pipelines.plan import make_plan

    made = make_plan(line, rows, rate)
    if json_:
        _print_json({"recipe": line.recipe.name, **made})


@app.command()
def rationales(
    recipe: RecipeArgument,
    reasons: Annotated[
        list[str], typer.Argument(metavar="[REASON]...", help="With --retry-rejected: only these.")
    ] = [],
    retry: Annotated[
        bool, typer.Option("--retry-rejected", help="Ask again for rejected texts, with another seed and temperature.")
    ] = False,
    set_: SetOption = [],
    force: ForceOption = False,
    json_: JsonOption = False,
) -> None:
    """STAGE 1: ask the teacher for a rationale and a label of every example; accept or reject each.

    The teacher is never asked again for what it has answered: --force reads its texts anew. A run that was stopped
    goes on where it was. Ask again for what was rejected: distill rationales RECIPE --retry-rejected unparsable
    """
    if reasons and not retry:
        raise UserError(f"rationales: {reasons[0]!r} is no recipe; reasons go with --retry-rejected")

    def work(line: Lineage) -> list[Artifact]:
        from pipelines.rationales import build_rationales, retry_rejected

        if retry:
            line = retry_rejected(line, reasons)
        return [build_rationales(line, force)]

    _stage(recipe, set_, json_, work)


@app.command()
def dataset(
    recipe: RecipeArgument, set_: SetOption = [], force: ForceOption = False, json_: JsonOption = False
) -> None:
    """STAGE 2: join examples and accepted rationales into training rows and splits."""

    def work(line: Lineage) -> list[Artifact]:
        from pipelines.dataset import build_dataset

        return [build_dataset(line, force)]

    _stage(recipe, set_, json_, work)


@app.command()
def train(recipe: RecipeArgument, set_: SetOption = [], force: ForceOption = False, json_: JsonOption = False) -> None:
    """STAGE 3: train every student of the recipe with Ray Train and DeepSpeed."""

    def work(line: Lineage) -> list[Artifact]:
        from pipelines.train import train_students

        return train_students(line, line.recipe.students(), force)

    _stage(recipe, set_, json_, work)


@app.command()
def evaluate(
    recipe: RecipeArgument, set_: SetOption = [], force: ForceOption = False, json_: JsonOption = False
) -> None:
    """STAGE 4: predict a split with every student; accuracy with its interval."""

    def work(line: Lineage) -> list[Artifact]:
        from pipelines.evaluate import evaluate_students

        return evaluate_students(line, line.recipe.students(), force)

    _stage(recipe, set_, json_, work)


@app.command()
def search(recipe: RecipeArgument, set_: SetOption = [], force: ForceOption = False, json_: JsonOption = False) -> None:
    """STAGE 5: try many students with Ray Tune; choose alpha on validation; score the chosen ones.

    The space is the recipe's `search`; --set search.preset=small is a first look. Rationales and dataset are made, too,
    where they are not there yet. A search that was stopped goes on.
    """

    def work(line: Lineage) -> list[Artifact]:
        from pipelines.search import search_students

        return [search_students(line, force)]

    _stage(recipe, set_, json_, work)


@app.command()
def report(recipe: RecipeArgument, set_: SetOption = [], force: ForceOption = False, json_: JsonOption = False) -> None:
    """STAGE 6: one report.html with the table, the figures, the funnel and the cost.

    Over the students that `distill search` chose, if it has been run; otherwise over those of the recipe's `runs`.
    """

    def work(line: Lineage) -> list[Artifact]:
        from pipelines.report import build_report

        if not line.search.done():
            return [build_report(line, force)]
        from pipelines.search import chosen_runs

        return [build_report(line, force, chosen_runs(line))]

    _stage(recipe, set_, json_, work)


@app.command()
def export(recipe: RecipeArgument, set_: SetOption = [], force: ForceOption = False, json_: JsonOption = False) -> None:
    """STAGE 7: the student that is best on validation as a bundle to serve: calibrated, with checksums and a card."""

    def work(line: Lineage) -> list[Artifact]:
        from pipelines.export import build_export

        return [build_export(line, force)]

    _stage(recipe, set_, json_, work)


@app.command()
def predict(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="The directory of a trained student, or a bundle.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT|FILE...", help="Inputs as the student reads them, or files with the task's columns."
        ),
    ],
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where predictions of files go; by default FILE.predictions.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Label inputs with a trained student: no teacher, no rationale.

    Files (.csv, .tsv, .json, .jsonl, .parquet) of any size become a folder of Parquet parts with their own columns,
    predicted_label and confidence. Stopped and run again, it goes on where it was.
    """
    _quiet(json_)
    from pipelines.predict import ENDINGS, predict_files
    from pipelines.predictor import Predictor

    if all(text.lower().endswith(ENDINGS) for text in inputs):
        files = predict_files(student, inputs, out)
        if json_:
            _print_json({"files": files})
        return
    made = Predictor.open(student).predict(inputs)
    for text, prediction in zip(inputs, made, strict=True):
        say(f"{prediction.label}\t{prediction.confidence:.3f}{' (abstains)' * prediction.abstained}\t{text}")
    if json_:
        shown = [{"label": p.label, "confidence": p.confidence, "abstained": p.abstained} for p in made]
        _print_json({"predictions": shown})


@app.command()
def serve(
    bundles: Annotated[list[str], typer.Argument(metavar="BUNDLE...", help="Folders that `distill export` made.")],
    host: Annotated[str, typer.Option(help="Beyond loopback, an API key is asked for.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    default: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Answers where a request names none; by default the first.")
    ] = None,
    keys_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="SHA-256 of API keys, one a line; asks for a key anywhere.")
    ] = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Ask nobody for a key, wherever the port is reached.")
    ] = False,
    replicas: Annotated[int, typer.Option(min=1)] = 1,
    cpus: Annotated[float, typer.Option(min=0.1, help="Of one replica.")] = 1.0,
    proxy: Annotated[
        bool,
        typer.Option(
            "--proxy",
            help="Put Ray Serve's proxy before one replica too, as before several: it holds requests while a replica "
            "that crashed is replaced, and takes some milliseconds more for each.",
        ),
    ] = False,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="A line of JSON for each request, without its inputs.")
    ] = True,
) -> None:
    """Answer over HTTP on this machine: labels, confidences, a page to try it. For a cluster see serve/config.yaml."""
    from serve.run import serve_here, settings_for

    settings = settings_for(bundles, host, no_key, default, keys_file, replicas, cpus, access_log)
    serve_here(settings, host, port, proxy)


@app.command()
def doctor(json_: JsonOption = False) -> None:
    """Check this machine: versions, vLLM, DeepSpeed's compiler, memory, disk, GPUs; say what to do about each lack."""
    _quiet(json_)
    from pipelines.doctor import examine

    findings = examine()
    show_table(
        "This machine",
        ["", "found", "what to do"],
        [[f.name, f.found, f.advice or "-"] for f in findings],
        numbers=False,
    )
    if json_:
        _print_json({"ok": all(f.ok for f in findings), "findings": [vars(f) for f in findings]})
    if not all(f.ok for f in findings):
        raise typer.Exit(1)


@app.command()
def submit(
    stage: Annotated[OnCluster, typer.Argument(metavar="STAGE", help="run, or the command of one stage.")],
    recipe: RecipeArgument,
    address: AddressOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when it has begun.")] = False,
    set_: SetOption = [],
    force: ForceOption = False,
    json_: JsonOption = False,
) -> None:
    """Run a stage, or all (`run`), on a Ray cluster; follow its log; end with its exit code.

    The working directory goes with it: recipe, task file, data; not runs/, models/ and what .gitignore names. The
    same again joins a job that is under way, and goes on where one that has ended stopped. Ctrl-C ends the following,
    not the job.
    """
    line = _load(recipe, set_, json_)
    _ = line.task  # mistakes are told here, before anything is sent
    from cluster import submit as cluster

    client = cluster.connect(address)
    job = cluster.submit(client, cluster.Job(stage, recipe, set_, force, line.snapshot()))
    if not detach:
        _follow(client, job, json_)
    elif json_:
        _print_json({"job": job})
    else:
        say(f"follow it: distill job logs {job} --follow; stop it: distill job stop {job}")


@job_app.command("status")
def job_status(job: JobArgument, address: AddressOption = None, json_: JsonOption = False) -> None:
    """Tell how a job stands."""
    _quiet(json_)
    from cluster import submit as cluster

    info = cluster.find(cluster.connect(address), job)
    say(f"job {job}: {cluster.describe(info)}")
    if json_:
        _print_json({"job": job, "status": info.status.value, "exit_code": info.driver_exit_code})


@job_app.command("logs")
def job_logs(
    job: JobArgument,
    address: AddressOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job ends; then end with its exit code.")
    ] = False,
) -> None:
    """Print what a job has said."""
    from cluster import submit as cluster

    client = cluster.connect(address)
    cluster.find(client, job)
    if follow:
        _follow(client, job, json_=False)
    print(client.get_job_logs(job), end="")


@job_app.command("stop")
def job_stop(job: JobArgument, address: AddressOption = None) -> None:
    """Stop a job; the same `distill submit` goes on from what it has written."""
    from cluster import submit as cluster

    client = cluster.connect(address)
    cluster.find(client, job)
    say(f"job {job}: {'is being stopped' if client.stop_job(job) else 'has ended already'}")


def _follow(client: "JobSubmissionClient", job: str, json_: bool) -> NoReturn:
    """Print a job's log until it ends, and end with its exit code."""
    from cluster import submit as cluster

    try:
        code = cluster.follow(client, job)
    except KeyboardInterrupt:
        say(f"job {job}: goes on; follow it: distill job logs {job} --follow; stop it: distill job stop {job}")
        raise typer.Exit(130) from None
    if json_:
        _print_json({"job": job, "exit_code": code})
    raise typer.Exit(code)


def main() -> None:
    """The command of `sys.argv`: exit 0 done, 2 the user's mistake in one sentence, 1 anything else."""
    try:
        app()
    except UserError as error:
        print(f"distill: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"distill: {error}; free some and run again", file=sys.stderr)
        sys.exit(2)


def _stage(recipe: str, overrides: list[str], json_: bool, work: Callable[[Lineage], list[Artifact]]) -> None:
    """Load the recipe, do the work, print what was made."""
    line = _load(recipe, overrides, json_)
    made = work(line)
    if json_:
        _print_json({"recipe": line.recipe.name, "artifacts": [_summary(artifact) for artifact in made]})


def _load(recipe: str, overrides: list[str], json_: bool) -> Lineage:
    _quiet(json_)
    return Lineage(load_recipe(recipe, overrides))


def _quiet(json_: bool) -> None:
    console.stderr = json_  # then stdout is for the JSON alone


def _summary(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest()
    hidden = {"recipe", "versions", "parents", "history"}
    return {"uri": artifact.uri, **{k: v for k, v in manifest.items() if k not in hidden}}


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))
