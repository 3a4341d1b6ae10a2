"""Which trial is next: the plan, minus what is committed, as soon as its reference is there.

Ray Tune asks a `Searcher` whenever a machine is free. The trials that wait for no reference are
handed out first, so that the machines are busy while the reference runs train, and the sorted
strategies follow when the store says that theirs is committed. One `fit` does the whole study.

A trial that came to nothing is handed out again, and a new attempt goes on from its newest
checkpoint. One that failed left a word in the store, and may do so a few times; machines that go
leave none, and may do so often.
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
"""How often a trial that failed of itself is started again in one run of the study (arbitrary)."""

RESTARTS = 20
"""The same for one whose process or machine died: a weekend on spot machines (arbitrary)."""


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
        self._errors: dict[int, int] = {}  # words of failure in the store when it was handed out
        self._failures: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter()
        self.failed: set[str] = set()
        """Labels of the trials that are given up."""
        self.superseded_by: str | None = None
        """A trial that another run of the study has begun as well."""

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
        # Any that runs may set others free, or fail and be handed out again.
        return None if self._running else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Look which trials a finished run has set free, or what becomes of a failed one."""
        position = self._running.pop(trial_id, None)
        if position is None:
            return
        if error and not self._is_committed(position):
            self._note_failure(position)
        elif result and result.get("superseded"):
            # Two runs of one study would go on taking each other's trials: the later one has them.
            self.superseded_by = self._trials[position].label
            self._waiting.clear()
        elif self._plan.is_reference(self._trials[position].config):
            self._trials = self._plan.resolve(read_commits(self._folder))

    def _note_failure(self, position: int) -> None:
        """Hand the trial out again, unless it has had its chances."""
        if self._count_errors(position) > self._errors[position] or not self._is_writable():
            self._failures[position] += 1
        else:
            self._deaths[position] += 1
        if self._failures[position] <= RETRIES and self._deaths[position] <= RESTARTS:
            self._waiting.append(position)
        else:
            self.failed.add(self._trials[position].label)

    def _is_writable(self) -> bool:
        """Return whether a trial that failed could leave a word: not so on a full disk."""
        try:
            self._folder.check_writable()
        except StoreError:
            return False
        return True

    def _is_committed(self, position: int) -> bool:
        """Return whether a trial is done, which its process may not have lived to say."""
        return self._folder_of(position).read_bytes("COMMIT.json") is not None

    def _count_errors(self, position: int) -> int:
        return len((self._folder_of(position) / ERRORS).files())

    def _folder_of(self, position: int) -> Folder:
        return self._folder / "trials" / str(self._trials[position].trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the store is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Take nothing back: the store is the truth."""
