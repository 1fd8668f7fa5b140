"""Where the numbers of a training run go: TensorBoard always; MLflow and Weights & Biases where the recipe names them.

Both are set up as their users know it: by `MLFLOW_TRACKING_URI`, `WANDB_PROJECT`, `WANDB_API_KEY`, … on every
node. A run that is continued goes on in the same entry.
"""

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.artifact import Artifact
from pipelines.errors import UserError

_FOLDER = "tensorboard"
_KEY = "stepdistill.key"


class Tracker:
    """The trackers of one run.

    Args:
        artifact: the run's; TensorBoard's files lie in its folder `tensorboard`.
        project: under which the run stands.
        name: of the run.
        settings: what the run was made with.
        names: `mlflow`, `wandb`.
        step: from which it goes on; what TensorBoard was told of later ones is void.
    """

    def __init__(
        self,
        artifact: Artifact,
        project: str,
        name: str,
        settings: Mapping[str, Any],
        names: Sequence[str] = (),
        step: int = 0,
    ) -> None:
        from tensorboardX import SummaryWriter

        self._artifact = artifact
        self._folder = artifact.path(_FOLDER) if artifact.local else tempfile.mkdtemp()
        self._board = SummaryWriter(self._folder, purge_step=step + 1)
        self._mlflow = _mlflow(artifact.key, project, name, settings) if "mlflow" in names else None
        self._wandb = _wandb(artifact.key, project, name, settings) if "wandb" in names else None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one step (from 1)."""
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._mlflow:
            self._mlflow.log_metrics(dict(numbers), step=step)
        if self._wandb:
            self._wandb.log(dict(numbers), step=step)

    def keep(self) -> None:
        """Bring what was told so far to the artefact's storage."""
        self._board.flush()
        if not self._artifact.local:
            self._artifact.fs.put(f"{self._folder}/", self._artifact.path(_FOLDER) + "/", recursive=True)

    def close(self) -> None:
        """The run is over."""
        self._board.close()
        self.keep()
        if self._mlflow:
            self._mlflow.end_run()
        if self._wandb:
            self._wandb.finish()


def check_trackers(names: Sequence[str]) -> None:
    """See that they are installed, before anything is trained.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"student.trackers: {name} is not installed; pip install 'stepdistill[{name}]'")


def _mlflow(key: str, project: str, name: str, settings: Mapping[str, Any]) -> Any:
    import mlflow

    experiment = mlflow.set_experiment(project)
    known = mlflow.MlflowClient().search_runs([experiment.experiment_id], f"tags.`{_KEY}` = '{key}'", max_results=1)
    mlflow.start_run(run_id=known[0].info.run_id if known else None, run_name=None if known else name)
    if not known:
        mlflow.set_tag(_KEY, key)
        mlflow.log_params(dict(settings))
    return mlflow


def _wandb(key: str, project: str, name: str, settings: Mapping[str, Any]) -> Any:
    import wandb

    project = os.environ.get("WANDB_PROJECT", project)
    return wandb.init(project=project, name=name, id=key, resume="allow", config=dict(settings))
