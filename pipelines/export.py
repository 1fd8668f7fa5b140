"""STAGE 7 `distill export`: the student that is best on validation → a bundle to serve.

The bundle is a folder of its own, to be copied anywhere: a plain Hugging Face directory (safetensors), `distill.json`
(the task, and how answers are calibrated), README.md (the model card) and SHA256SUMS, which are checked wherever it
is loaded. Temperature, threshold and precision are chosen on validation; `evaluate.split` only measures the result.
"""

import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch

from pipelines.artifact import Artifact
from pipelines.bundle import Bundle, Precision
from pipelines.calibration import calibration_error, choose_threshold, fit_temperature
from pipelines.checksums import write_checksums
from pipelines.comparison import wilson
from pipelines.console import say
from pipelines.errors import UserError
from pipelines.lineage import BUNDLE, MODEL, Lineage
from pipelines.predictor import Prediction, Predictor, can_run
from pipelines.prompts import prompt_hash
from pipelines.recipe import Export, Run

TEMPLATE = "card.md.j2"
_TIMED = (1, 8, 32)  # rows at once, of the card's speeds
_LOWER: tuple[Precision, ...] = ("bf16", "int8")
_Row = dict[str, Any]
_Tried = dict[str, float]


@dataclass(frozen=True)
class Scored:
    """A labelled split as a predictor answers it."""

    rows: Sequence[_Row]
    made: Sequence[Prediction]
    right: Sequence[bool]

    def measures(self) -> dict[str, float]:
        """Accuracy with its interval, calibration, and what is answered at the threshold; shares from 0 to 1."""
        answered = [right for made, right in zip(self.made, self.right, strict=True) if not made.abstained]
        accuracy, low, high = wilson(sum(self.right) / len(self.rows), len(self.rows))
        return {
            "rows": len(self.rows),
            "accuracy": accuracy,
            "low": low,
            "high": high,
            "calibration_error": calibration_error([p.confidence for p in self.made], self.right),
            "answered": len(answered) / len(self.rows),
            "answered_accuracy": sum(answered) / len(answered) if answered else 0.0,
        }


def build_export(line: Lineage, force: bool = False) -> Artifact:
    """Make the bundle, or find it done.

    Raises:
        UserError: a student is not trained, a split has no gold labels, or the precision that is asked for does not
            answer as fp32 does.
    """
    dataset = line.require(line.dataset, "dataset")
    students = [(run, line.require(line.student(run), "train")) for run in line.recipe.students()]
    artifact = line.export
    if artifact.begin(force):
        with artifact.lease():
            _bundle(line, artifact, dataset, students)
    return artifact


def _bundle(line: Lineage, artifact: Artifact, dataset: Artifact, students: list[tuple[Run, Artifact]]) -> None:
    start = time.time()
    run, student = max(students, key=lambda pair: float(pair[1].manifest()["best"]["score"]))
    with tempfile.TemporaryDirectory() as given, tempfile.TemporaryDirectory() as made:
        student.fs.get(student.path(MODEL) + "/", given, recursive=True)
        predictor = Predictor.open(given)
        validation = _score(predictor, _labelled(dataset, "validation"))
        precision, fast, tried = _choose_precision(line.recipe.export, predictor, Path(given), validation)
        if precision != "fp32":
            validation = _score(fast, validation.rows)
        temperature, threshold = _calibrate(line.recipe.export, validation)
        bundle = Bundle(line.recipe.name, artifact.key, temperature, threshold, precision)
        predictor.bundle = fast.bundle = bundle
        split = line.recipe.evaluate.split
        measures = {name: _score(fast, _labelled(dataset, name)).measures() for name in ("validation", split)}
        facts = {
            "run": run.model_dump(),
            "bundle": asdict(bundle),
            "precisions": tried,
            "calibration_error_before": validation.measures()["calibration_error"],
            "measures": measures,
            "milliseconds": _milliseconds(fast, validation.rows),
        }
        shutil.copytree(given, made, dirs_exist_ok=True)
        predictor.describe(made)
        Path(made, "README.md").write_text(_card(line, student, split, facts), encoding="utf-8")
        write_checksums(Path(made))
        artifact.fs.put(f"{made}/", f"{artifact.path(BUNDLE)}/", recursive=True)
    artifact.finish(line.snapshot(), [student, dataset], start, **facts)
    measured = measures[split]
    say(
        f"  {run.name}, {precision}, temperature {temperature:.3f}: {split} accuracy {measured['accuracy']:.4f}, "
        f"calibration error {measured['calibration_error']:.4f}, {measured['answered']:.1%} answered\n"
        f"  serve it: distill serve {artifact.file_uri(BUNDLE)}"
    )


def _labelled(dataset: Artifact, split: str) -> list[_Row]:
    rows = [row for row in dataset.iter_rows(split) if row["label"] is not None]
    if not rows:
        raise UserError(f"{dataset.uri}: the {split} split has no gold labels, and a bundle is measured on them")
    return rows


def _score(predictor: Predictor, rows: Sequence[_Row]) -> Scored:
    made = predictor.predict([r["input"] for r in rows], [r["choices"] for r in rows], scores=True)
    right = [predictor.task.same(p.label, r["label"]) for p, r in zip(made, rows, strict=True)]
    return Scored(rows, made, right)


def _choose_precision(
    export: Export, fp32: Predictor, folder: Path, validation: Scored
) -> tuple[Precision, Predictor, dict[Precision, _Tried]]:
    """The precision to serve in, the predictor in it, and what became of each that was tried.

    Raises:
        UserError: the precision that is asked for does not answer as fp32 does.
    """
    tried: dict[Precision, _Tried] = {"fp32": {"agreement": 1.0, "rows_per_second": _speed(fp32, validation.rows)}}
    best: tuple[Precision, Predictor] = ("fp32", fp32)
    for precision in _LOWER:
        if export.precision != precision and not (export.precision == "auto" and can_run(precision)):
            continue
        lower = Predictor.open(folder, precision=precision)
        made = _score(lower, validation.rows).made
        same = [fp32.task.same(a.label, b.label) for a, b in zip(validation.made, made, strict=True)]
        agreement, speed = sum(same) / len(same), _speed(lower, validation.rows)
        tried[precision] = {"agreement": agreement, "rows_per_second": speed}
        if agreement >= export.agreement and (
            export.precision == precision or speed > tried[best[0]]["rows_per_second"]
        ):
            best = precision, lower
        elif export.precision == precision:
            raise UserError(
                f"export.precision {precision}: it answers {agreement:.2%} of validation as fp32 does, and "
                f"export.agreement asks for {export.agreement:.2%}; take fp32"
            )
    return *best, tried


def _speed(predictor: Predictor, rows: Sequence[_Row]) -> float:
    """Rows a second, on at most 512 of them."""
    part = rows[:512]
    start = time.perf_counter()
    predictor.predict([r["input"] for r in part], [r["choices"] for r in part])
    return round(len(part) / (time.perf_counter() - start), 1)


def _calibrate(export: Export, validation: Scored) -> tuple[float, float]:
    """The temperature and the threshold that validation asks for.

    Raises:
        UserError: no threshold reaches `export.answered_accuracy`.
    """
    probabilities, places = [], []
    for row, made, right in zip(validation.rows, validation.made, validation.right, strict=True):
        if made.scores is None:  # a decoded text: it is right, or another would be
            probabilities.append([made.confidence, 1 - made.confidence])
            places.append(0 if right else 1)
        else:
            probabilities.append(list(made.scores.values()))
            places.append(list(made.scores).index(row["label"]))
    temperature = fit_temperature(probabilities, places)
    if export.answered_accuracy is None:
        return temperature, export.abstain_below
    confidences = []
    for given, made in zip(probabilities, validation.made, strict=True):
        powers = [p ** (1 / temperature) for p in given]
        confidences.append((max(powers) if made.scores else powers[0]) / sum(powers))
    threshold = choose_threshold(confidences, validation.right, export.answered_accuracy)
    if threshold is None:
        raise UserError(
            f"export.answered_accuracy {export.answered_accuracy}: no threshold reaches it on validation, not even "
            "for the student's surest answers; ask for less"
        )
    return temperature, threshold


def _milliseconds(predictor: Predictor, rows: Sequence[_Row]) -> dict[int, float]:
    """The median time of a batch of validation rows, by its size."""
    times: dict[int, list[float]] = {size: [] for size in _TIMED}
    for turn in range(6):
        for size in _TIMED:
            batch = [rows[(turn * size + n) % len(rows)] for n in range(size)]
            start = time.perf_counter()
            predictor.predict([r["input"] for r in batch], [r["choices"] for r in batch])
            if turn:  # the first lays out memory
                times[size].append(1000 * (time.perf_counter() - start))
    return {size: round(statistics.median(made), 2) for size, made in times.items()}


def _card(line: Lineage, student: Artifact, split: str, facts: dict[str, Any]) -> str:
    """The model card: what it is, what was measured, its limits, where it comes from."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown
    )
    environment.filters.update(percent=lambda share: f"{share:.1%}", json=lambda v: json.dumps(v, ensure_ascii=False))
    teacher = line.recipe.teacher
    return environment.get_template(TEMPLATE).render(
        recipe=line.recipe,
        task=line.task,
        student=student,
        trained=student.manifest(),
        split=split,
        facts=facts,
        version=line.export.key,
        prompt_hash=prompt_hash(line.task, teacher.prompt, teacher.rationale_length),
        dataset=line.dataset,
        rationales=line.rationales,
        generations=line.generations,
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    )
