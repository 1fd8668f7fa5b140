"""What a report says of its students: their scores beside each other, what a search tried, what the numbers mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.artifact import Artifact
from pipelines.comparison import Cell, Interval, Score, Tried, by_alpha, summarise, wilson
from pipelines.costs import Took, took
from pipelines.lineage import Lineage
from pipelines.recipe import Run
from pipelines.schema import TRIALS
from pipelines.verdicts import Verdict, judge_amount, judge_control, judge_labels, judge_rationales, judge_size


@dataclass(frozen=True)
class Student:
    """One student: its outcomes, its artefacts and what their manifests say."""

    score: Score
    artifact: Artifact
    evaluation: Artifact
    trained: dict[str, Any]
    evaluated: dict[str, Any]

    @property
    def validation(self) -> float:
        """By the recipe's metric."""
        return float(self.trained["best"]["score"])


@dataclass(frozen=True)
class Findings:
    """What the page shows of the students."""

    students: list[Student]  # in the recipe's order
    best: Student  # on validation; the first of equals
    cells: list[Cell]
    verdict: Verdict
    teacher: Interval | None  # None: it was not asked for this split
    teacher_rows: int
    other_teachers: dict[str, Interval]  # whose rationales the dataset holds too, where they were asked for this split
    sentences: list[str]  # what else is to be said
    trials: list[dict[str, Any]]  # of the search that chose the students, if one did; rows of `schema.TRIALS`
    tried: list[Tried]

    @property
    def rows(self) -> int:
        return len(self.best.score.right)

    @property
    def parameters(self) -> dict[str | None, int]:
        """Of each model."""
        return {s.score.run.model: s.trained["parameters"] for s in self.students}


def find(line: Lineage, runs: Sequence[Run], searched: bool) -> Findings:
    """Read the students' artefacts, all of which are there, and compare them.

    Args:
        searched: whether they are those that the search chose, so that what it tried is to be told.
    """
    students = _read_students(line, runs)
    scores = [student.score for student in students]
    resamples = line.recipe.evaluate.resamples
    told = line.rationales.manifest()["teacher_accuracy"].get(line.recipe.evaluate.split)
    teacher = wilson(told["accuracy"], told["rows"]) if told else None
    cells = summarise(scores, resamples)
    trials = _trials(line) if searched else []
    sentences = [
        *judge_amount(scores, resamples),
        judge_control(scores, resamples),
        *judge_labels(scores, resamples),
    ]
    found = Findings(
        students=students,
        best=max(students, key=lambda student: student.validation),
        cells=cells,
        verdict=judge_rationales(scores, resamples),
        teacher=teacher,
        teacher_rows=told["rows"] if told else 0,
        other_teachers=_other_teachers(line),
        sentences=[sentence for sentence in sentences if sentence],
        trials=trials,
        tried=by_alpha(trials or [_as_trial(student) for student in students]),
    )
    if teacher:
        sizes = {_told(cell): (found.parameters[cell.model], cell.accuracy, cell.examples) for cell in cells}
        found.sentences.append(judge_size(sizes, teacher))
    return found


def _read_students(line: Lineage, runs: Sequence[Run]) -> list[Student]:
    students = []
    row_ids = None
    for run in runs:
        artifact, evaluation = line.student(run), line.evaluation(run)
        trained, evaluated = artifact.manifest(), evaluation.manifest()
        predictions = evaluation.read_table("predictions", columns=["row_id", "correct"]).sort_by("row_id")
        row_ids = predictions["row_id"] if row_ids is None else row_ids
        if not predictions["row_id"].equals(row_ids):
            raise RuntimeError(f"{evaluation.uri}: not the rows of the other students, so nothing can be paired")
        metrics = evaluated["metrics"]
        score = Score(
            run=run,
            right=predictions["correct"].to_numpy().astype(bool),
            accuracy=Interval(metrics["accuracy"], metrics["low"], metrics["high"]),
            examples=trained["rows"],
            rationales=trained["rationales"],
        )
        students.append(Student(score, artifact, evaluation, trained, evaluated))
    return students


def _other_teachers(line: Lineage) -> dict[str, Interval]:
    """By their model."""
    made = {}
    for manifest in (artifact.manifest() for artifact in line.further_rationales):
        if told := manifest["teacher_accuracy"].get(line.recipe.evaluate.split):
            made[manifest["recipe"]["teacher"]["model"]] = wilson(told["accuracy"], told["rows"])
    return made


def _told(cell: Cell) -> str:
    return " ".join([cell.arm, *([] if cell.model is None else [f"from {cell.model}"])])


def _trials(line: Lineage) -> list[dict[str, Any]]:
    """What the search tried."""
    unknown = dict.fromkeys(TRIALS.names)  # what older searches did not write
    return [unknown | trial for trial in line.search.read_table("trials").to_pylist()]


def _as_trial(student: Student) -> dict[str, Any]:
    """A student of the recipe's `runs`, which no search has chosen."""
    return {**student.score.run.model_dump(), "score": student.validation, "state": "done", "chosen": False}


def took_by_students(line: Lineage, found: Findings) -> list[Took]:
    """Of every student that was trained for this report: the ones on it, and those that a search tried."""
    done = {student.artifact.key: student.trained for student in found.students}
    stopped = []
    for trial in found.trials:
        if trial["state"] == "done":
            done.setdefault(trial["key"], line.store.artifact("train", trial["key"]).manifest())
        elif trial["key"] not in done and trial["seconds"] is not None:
            seconds = trial["seconds"] * line.recipe.student.workers
            stopped.append(Took(seconds, trial["tokens_read"], trial["tokens_written"]))
    return [*(took(manifest) for manifest in done.values()), *stopped]
