"""What a search does as its trials end: it tells how many have, and frees the places of those that were stopped.

Ray Train leaves the second to an actor that asks the dashboard whether a run is dead. Where there is no dashboard, or
several Rays are on one machine, it never learns that, and the places would be taken until the search is over.
"""

import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.tune import Callback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipelines.console import duration, say


class TrialWatch(Callback):  # type: ignore[misc]  # Ray is not followed
    """Holds plain values alone until a search begins, since Tune keeps it for when the search is gone on with.

    Args:
        total: trials.
        steps: that a trial takes if it is not stopped.
    """

    def __init__(self, total: int, steps: int) -> None:
        self.total, self.steps = total, steps

    def setup(self, **_: Any) -> None:
        self._began, self._ended_here = time.monotonic(), 0
        self._actors: dict[str, Any] = {}  # of trials that run
        # a call that fails when an actor is dead -> the actor, its places
        self._leaving: dict[Any, tuple[Any, PlacementGroup]] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._actors[trial.trial_id] = trial.temporary_state.ray_actor

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trials, trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trials, trial)

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._free(timeout=0)

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        """The chosen students are trained next, and want the places."""
        deadline = time.monotonic() + 60
        while self._leaving and time.monotonic() < deadline:
            self._free(timeout=1)

    def _end(self, trials: list[Any], trial: Any) -> None:
        actor, places = self._actors.pop(trial.trial_id, None), trial.last_result.get("placement_group")
        if actor is None:
            return  # it had no turn
        self._ended_here += 1
        ended = 1 + sum(other.is_finished() for other in trials if other is not trial)
        left = (time.monotonic() - self._began) / self._ended_here * (self.total - ended)
        say(f"  {ended:,} of {self.total:,} students tried" + (f", about {duration(left)} to go" if left else ""))
        if places and trial.last_result["step"] < self.steps:
            group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(places)))
            ray.kill(actor)  # which Tune does by letting go of it, but we hold it; its workers go with it
            self._leaving[actor.__ray_ready__.remote()] = (actor, group)

    def _free(self, timeout: float) -> None:
        """Remove the places of trials whose actor is dead; before, Ray Train would take others in their stead."""
        if not self._leaving:
            return
        for ended in ray.wait(list(self._leaving), num_returns=1, timeout=timeout)[0]:
            actor, group = self._leaving.pop(ended)
            try:
                ray.get(ended)
            except RayError:
                remove_placement_group(group)
            else:
                self._leaving[actor.__ray_ready__.remote()] = (actor, group)
