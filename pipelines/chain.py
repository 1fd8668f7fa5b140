"""`distill run`: the stages in their order, each skipped when its artefact is there."""

from pipelines.artifact import Artifact
from pipelines.dataset import build_dataset
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
    line.check(line.recipe.students())
    with ray_session(line.recipe.storage):
        build_rationales(line, force)
        build_dataset(line, force)
        train_students(line, line.recipe.students(), force)
        evaluate_students(line, line.recipe.students(), force)
    return build_report(line, force)
