"""Asynchronous successive halving within groups: trials are compared with those of their own group alone."""

from collections.abc import Callable, Hashable
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler


class AshaByGroup(TrialScheduler):  # type: ignore[misc]  # Ray is not followed
    """One ASHA (Li et al., MLSys 2020) a group.

    A student that learns from an eighth of the rows is no worse a trial than one that learns from all, and a seed no
    better than another; one ASHA over all would stop just those that a figure needs.

    Args:
        group_of: a trial's config → its group.
        asha: of `AsyncHyperBandScheduler`.
    """

    def __init__(self, group_of: Callable[[dict[str, Any]], Hashable], **asha: Any) -> None:
        super().__init__()
        self._group_of, self._asha = group_of, {**asha, "stop_last_trials": False}
        self._search: tuple[str | None, str | None] = (None, None)
        self._groups: dict[Hashable, AsyncHyperBandScheduler] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """What the groups compare by."""
        self._search = (metric, mode)
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(self._of(trial).on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """First come, first served: as ASHA does."""
        waiting = (trial for trial in tune_controller.get_trials() if trial.status in ("PENDING", "PAUSED"))
        return next(waiting, None)

    def debug_string(self) -> str:
        return f"ASHA in {len(self._groups)} groups"

    def _of(self, trial: Any) -> AsyncHyperBandScheduler:
        group = self._group_of(trial.config)
        if group not in self._groups:
            scheduler = AsyncHyperBandScheduler(**self._asha)
            scheduler.set_search_properties(*self._search)
            self._groups[group] = scheduler
        return self._groups[group]
