"""Which trial is next: the plan, minus what is committed, as soon as its reference is there.

Ray Tune asks a `Searcher` whenever a machine is free. The trials that wait for no reference are
handed out first, so that the machines are busy while the reference runs train, and the sorted
strategies follow when the store says that theirs is committed. One `fit` does the whole study.
"""

from collections.abc import Sequence
from typing import Any

from ray.tune.search import Searcher

from sampimp.folder import Folder
from sampimp.plan import Plan, PlannedTrial, read_commits


class PlanSearcher(Searcher):
    """Hand out the trials of a plan that are not in the store yet.

    Parameters
    ----------
    plan
        The study.
    folder
        Its store.
    trials
        The plan resolved against the store's commits.
    """

    def __init__(self, plan: Plan, folder: Folder, trials: Sequence[PlannedTrial]) -> None:
        super().__init__(metric=None, mode=None)
        self._plan, self._folder = plan, folder
        self._trials = list(trials)
        self._waiting = [i for i, trial in enumerate(trials) if trial.commit is None]
        self._running: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """Return a trial's configuration, None to be asked again, or FINISHED."""
        for position in self._waiting:
            trial = self._trials[position]
            if trial.trial_id is not None:
                self._waiting.remove(position)
                self._running[trial_id] = position
                return {
                    "position": position,
                    "label": trial.label,
                    "trial_id": trial.trial_id,
                    "fingerprint": trial.fingerprint,
                    "reference_id": trial.reference_id,
                }
        awaited = any(
            self._plan.is_reference(self._trials[position].config)
            for position in self._running.values()
        )
        return None if self._waiting and awaited else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Look which trials a finished reference run has set free."""
        position = self._running.pop(trial_id, None)
        if position is not None and self._plan.is_reference(self._trials[position].config):
            self._trials = self._plan.resolve(read_commits(self._folder))

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the store is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Take nothing back: the store is the truth."""
