"""Choose the trial that trains next: planned, not committed, its reference run committed.

Ray Tune asks a `Searcher` whenever a machine is free. Trials that need no reference run come first,
so that the machines are busy while the reference runs train. The strategies that sort follow once
the store has the commit of their reference run. One call of `fit` trains the whole study.

A trial that ended without a commit is suggested again, and the new attempt continues from its
newest checkpoint. A trial that failed has written its error into the store; that may happen
`RETRIES` times. A process or machine that dies writes none; that may happen `RESTARTS` times.

Map: `PlanSearcher`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray.tune.search import Searcher

from sampimp.errors import StoreError
from sampimp.store.attempts import ERRORS
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial, read_commits

RETRIES = 2
"""How often a trial that raised an error is started again in one run of the study (arbitrary)."""

RESTARTS = 20
"""Restarts of a trial whose process or machine died: a weekend on spot machines (arbitrary)."""


class PlanSearcher(Searcher):
    """Suggests the trials of a plan that the store does not have.

    Parameters
    ----------
    plan
        The plan of the study.
    folder
        The store of the study.
    trials
        The plan, matched with the commits in the store.
    """

    def __init__(self, plan: Plan, folder: Folder, trials: Sequence[PlannedTrial]) -> None:
        super().__init__(metric=None, mode=None)
        self._plan, self._folder = plan, folder
        self._trials = list(trials)
        self._waiting = [i for i, trial in enumerate(trials) if trial.commit is None]
        self._running: dict[str, int] = {}
        self._errors: dict[int, int] = {}  # errors in the store when the trial was suggested
        self._failures: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter()
        self.failed: set[str] = set()
        """Labels of the trials that are not tried again."""
        self.superseded_by: str | None = None
        """Label of a trial that another run of the study has begun as well."""

    def suggest(self, trial_id: str) -> Any:
        """Return a trial's configuration, None to be asked again, or FINISHED."""
        for position in self._waiting:
            trial = self._trials[position]
            if trial.trial_id is not None:
                self._waiting.remove(position)
                self._running[trial_id] = position
                self._errors[position] = self._count_errors(position)
                return {
                    "position": position,
                    "label": trial.label,
                    "trial_id": trial.trial_id,
                    "fingerprint": trial.fingerprint,
                    "reference_id": trial.reference_id,
                }
        # A trial that runs may unblock others, or fail and be suggested again.
        return None if self._running else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Unblock the trials that waited for this one, or suggest it again if it failed."""
        position = self._running.pop(trial_id, None)
        if position is None:
            return
        if error and not self._is_committed(position):
            self._note_failure(position)
        elif result and result.get("superseded"):
            # Two runs of one study would take each other's trials without end; the later one
            # keeps them.
            self.superseded_by = self._trials[position].label
            self._waiting.clear()
        elif self._plan.is_reference(self._trials[position].config):
            self._trials = self._plan.resolve(read_commits(self._folder))

    def _note_failure(self, position: int) -> None:
        """Suggest the trial again, unless it has failed or died too often."""
        if self._count_errors(position) > self._errors[position] or not self._is_writable():
            self._failures[position] += 1
        else:
            self._deaths[position] += 1
        if self._failures[position] <= RETRIES and self._deaths[position] <= RESTARTS:
            self._waiting.append(position)
        else:
            self.failed.add(self._trials[position].label)

    def _is_writable(self) -> bool:
        """Return whether a failed trial could write its error; on a full disk it could not."""
        try:
            self._folder.check_writable()
        except StoreError:
            return False
        return True

    def _is_committed(self, position: int) -> bool:
        """Return whether a trial is committed; its process may have died after the commit."""
        return self._folder_of(position).read_bytes("COMMIT.json") is not None

    def _count_errors(self, position: int) -> int:
        return len((self._folder_of(position) / ERRORS).files())

    def _folder_of(self, position: int) -> Folder:
        return self._folder / "trials" / str(self._trials[position].trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the store has the state of the study."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the store has the state of the study."""
