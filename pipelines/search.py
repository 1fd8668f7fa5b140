"""STAGE 5 `distill search`: many students with Ray Tune; alpha chosen on validation; the chosen ones scored.

Every trial trains a student into the very artefact that `distill train` would make, so a student that is there is
not trained again, by whichever command it came. A point is an arm, labels, a fraction and a model; its students differ
in alpha and seed. The alpha of a point is the one with the best mean validation score over seeds; its students, and
no others, read the test split. Writes `trials.parquet`; what was chosen is in the manifest.
"""

import os
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import mean
from typing import Any

import pyarrow as pa

from pipelines.artifact import Artifact
from pipelines.console import say, show_table
from pipelines.dataset import build_dataset
from pipelines.errors import UserError
from pipelines.evaluate import evaluate_students
from pipelines.examples import tell_counts
from pipelines.lineage import Lineage
from pipelines.progress import progress_of
from pipelines.rationales import build_rationales
from pipelines.ray_session import ray_session
from pipelines.recipe import Run
from pipelines.schema import TRIALS
from pipelines.train import room, train_student, train_students

_WAITING = {"memory": 2**29}  # what a trial itself takes: any share of a CPU would be lacked by its workers
_TUNE = "tune"  # the folder of Ray Tune's own state
Trial = dict[str, Any]  # a row of `schema.TRIALS`, with its `Run` under `run`
Point = tuple[Any, ...]


def search_students(line: Lineage, force: bool = False) -> Artifact:
    """Try the points of the recipe's search, choose, and score what was chosen. What is not there yet of the stages
    before is made.

    Raises:
        UserError: what a stage finds at fault, or no student could be trained.
    """
    points = line.recipe.search.points()
    line.check(points)
    artifact = line.search
    if artifact.begin(force, go_on=True):
        with artifact.lease(), ray_session(line.recipe.storage):
            build_rationales(line)
            build_dataset(line)
            start = time.time()
            for sentence in tell_counts(line.examples.manifest()["counts"]):
                say(f"  {sentence}")
            trials = _try(line, points, artifact)
            chosen = choose(trials)
            if not chosen:
                raise UserError(f"{artifact.uri}: no trial ended with a student; the last error: {_last_error(trials)}")
            train_students(line, chosen)  # those that were stopped early, to their end
            evaluate_students(line, chosen)
            rows = [{**trial, "chosen": trial["run"] in chosen, **trial["run"].model_dump()} for trial in trials]
            artifact.write_table("trials", pa.Table.from_pylist(rows, TRIALS))
            artifact.finish(
                line.snapshot(),
                [line.dataset],
                start,
                chosen=[run.model_dump() for run in chosen],
                counts=_counts(trials),
                reads_of_test=line.reads_of_test(),
            )
    _show(artifact)
    return artifact


def chosen_runs(line: Lineage) -> list[Run]:
    """The students that a finished search chose.

    Raises:
        UserError: it is not finished.
    """
    found = line.require(line.search, "search")
    return [Run.model_validate(run) for run in found.manifest()["chosen"]]


def choose(trials: Sequence[Trial]) -> list[Run]:
    """Of each point the students, over all seeds, with the alpha whose mean score on validation is best.

    A student that was stopped early counts with the best score it had; one that failed or never began does not
    count, and where it is of the chosen alpha, is not chosen.
    """
    points: dict[Point, dict[float | None, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        if trial["score"] is not None:
            points[point_of(trial["run"])][trial["run"].alpha].append(trial)
    chosen = []
    for alphas in points.values():
        best = max(alphas.values(), key=lambda group: (len(group), mean(trial["score"] for trial in group)))
        chosen += [trial["run"] for trial in best]
    return chosen


def point_of(run: Run) -> Point:
    """What is not chosen but compared."""
    return run.labels, run.fraction, run.model, run.teacher, run.arm


def _try(line: Lineage, points: Sequence[Run], artifact: Artifact) -> list[Trial]:
    """Run the trials, or those that an earlier attempt left; what each came to, in the order of the points."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray import tune

    from pipelines.trials import TrialWatch

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other kind is never silent
    search, student = line.recipe.search, line.recipe.student
    say(f"  {len(points):,} students to try, {room(student):,} at once")
    storage = artifact.uri if artifact.local else artifact.path()
    filesystem = None if artifact.local else PyFileSystem(FSSpecHandler(artifact.fs))
    with progress_of(line.recipe.name, student.steps) as messages:
        trainable = tune.with_resources(tune.with_parameters(_trial, line=line, messages=messages), _WAITING)
        if tune.Tuner.can_restore(f"{storage}/{_TUNE}", storage_filesystem=filesystem):
            tuner = tune.Tuner.restore(
                f"{storage}/{_TUNE}", trainable, storage_filesystem=filesystem, restart_errored=True
            )
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={"run": tune.grid_search([run.model_dump() for run in points])},
                tune_config=tune.TuneConfig(
                    metric="score",
                    mode="max",
                    max_concurrent_trials=room(student),
                    scheduler=_scheduler(line),
                    time_budget_s=search.max_hours and search.max_hours * 3600,
                ),
                run_config=tune.RunConfig(
                    name=_TUNE,
                    storage_path=storage,
                    storage_filesystem=filesystem,
                    failure_config=tune.FailureConfig(max_failures=search.retries),
                    callbacks=[TrialWatch(len(points), student.steps)],
                    verbose=0,
                ),
            )
        results = tuner.fit()
    told = {Run.model_validate(result.config["run"]): result for result in results}
    return [_outcome(line, run, told.get(run)) for run in points]


def _trial(config: dict[str, Any], line: Lineage, messages: Any) -> dict[str, Any]:
    """One student, in a process of its own that only waits for its workers."""
    from ray.tune.integration.ray_train import TuneReportCallback

    run = Run.model_validate(config["run"])
    student = line.student(run)
    if not student.done():
        train_student(line, run, messages, [TuneReportCallback()])
    best = student.manifest()["best"]
    return {"step": line.recipe.student.steps, "score": best["score"]}


def _scheduler(line: Lineage) -> Any:
    from pipelines.asha import AshaByGroup  # it imports Ray, which reads the environment that `ray_session` sets

    search, student = line.recipe.search, line.recipe.student
    grace = student.eval_every * search.grace_looks
    if not search.stop_early or grace >= student.steps:  # by then all are at their end
        return None
    return AshaByGroup(
        _group_of,
        time_attr="step",
        max_t=student.steps,
        grace_period=grace,
        reduction_factor=search.reduction_factor,
    )


def _group_of(config: dict[str, Any]) -> Point:
    run = Run.model_validate(config["run"])
    return (*point_of(run), run.seed)


def _outcome(line: Lineage, run: Run, result: Any) -> Trial:
    student = line.student(run)
    made: Trial = {"run": run, "name": run.name, "key": student.key, "error": None, "step": None, "score": None}
    made |= {"seconds": None, "tokens_read": None, "tokens_written": None}
    if student.done():
        manifest = student.manifest()
        return made | {"state": "done", "step": manifest["steps"], "score": manifest["best"]["score"]}
    if result is not None and result.error is not None:
        return made | {"state": "failed", "error": str(result.error).strip().splitlines()[-1]}
    if result is None or not (result.metrics or {}).get("step"):
        return made | {"state": "not reached"}
    told = {name: result.metrics[name] for name in ("step", "score", "tokens_read", "tokens_written")}
    return made | {"state": "stopped", "seconds": result.metrics["time_total_s"], **told}


def _counts(trials: Sequence[Trial]) -> dict[str, int]:
    states = [trial["state"] for trial in trials]
    return {state: states.count(state) for state in ("done", "stopped", "failed", "not reached")}


def _last_error(trials: Sequence[Trial]) -> str:
    return next((trial["error"] for trial in reversed(trials) if trial["error"]), "none")


def _show(artifact: Artifact) -> None:
    manifest = artifact.manifest()
    trials = artifact.read_table("trials").to_pylist()
    groups: dict[Point, list[dict[str, Any]]] = defaultdict(list)
    for trial in trials:
        own = (trial[name] for name in ("model", "teacher") if trial[name] is not None)
        groups[trial["arm"], trial["labels"], trial["fraction"], *own, trial["alpha"]].append(trial)
    rows = []
    for (arm, labels, fraction, *names, alpha), group in groups.items():
        known = [trial["score"] for trial in group if trial["score"] is not None]
        states = [trial["state"] for trial in group]
        rows.append(
            [
                " ".join([arm, labels, f"{fraction:.4g}", *names]),
                "" if alpha is None else f"{alpha:.4g}",
                f"{mean(known):.4f}" if known else "",
                ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
                "chosen" if group[0]["chosen"] else "",
            ]
        )
    show_table("Search", ["point", "alpha", "validation", "students", ""], rows)
    say(
        f"  {sum(manifest['counts'].values()):,} trials: {', '.join(f'{n} {s}' for s, n in manifest['counts'].items())}"
    )
    say(f"  read test: {len(manifest['reads_of_test']):,} students, listed in {artifact.file_uri('manifest.json')}")
