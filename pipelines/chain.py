"""`distill run`: the stages in their order, each skipped when its artefact is there."""

from pipelines.artifact import Artifact
from pipelines.dataset import build_dataset
from pipelines.errors import UserError
from pipelines.evaluate import evaluate_students
from pipelines.lineage import Lineage
from pipelines.rationales import build_rationales
from pipelines.ray_session import ray_session
from pipelines.report import build_report
from pipelines.train import train_students


def run_chain(line: Lineage, force: bool = False) -> Artifact:
    """From the source to the report, on one Ray session.

    Raises:
        UserError: whatever a stage finds at fault.
    """
    _check_whole(line)
    with ray_session(line.recipe.storage):
        build_rationales(line, force)
        build_dataset(line, force)
        train_students(line, line.recipe.students(), force)
        evaluate_students(line, line.recipe.students(), force)
    return build_report(line, force)


def _check_whole(line: Lineage) -> None:
    """What a late stage would find at fault, before the teacher is paid."""
    _ = line.report(
        line.recipe.students()
    )  # its key holds the keys of all stages, so every file and model must be there
    source, split = line.recipe.source, line.recipe.evaluate.split
    if not (source.train or source.validation):
        raise UserError("source has neither train nor validation, and a student's checkpoint is chosen on gold labels")
    if split == "test" and not source.test:
        raise UserError("source.test is not given; give it, or set evaluate.split to validation")
