"""Choose the unit of work that is next: not committed, all that it waits for committed.

Ray Tune asks a `Searcher` whenever a machine is free. Units that wait for no other come first, so
that the machines are busy meanwhile: the strategies that sort follow once the store has the commit
of their reference run. One call of `fit` performs them all. Where a unit waits for a run that is
trained by another command, the store is asked every `POLL_EVERY` seconds.

A unit that ended without a commit is suggested again, and the new attempt continues from its
newest checkpoint. A unit that failed has written its error into the store; that may happen
`RETRIES` times. A process or machine that dies writes none; that may happen `RESTARTS` times.

Map: `UnitSearcher`.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from sampimp.errors import StoreError
from sampimp.store.attempts import ERRORS
from sampimp.store.commits import read_commit
from sampimp.store.location import Folder
from sampimp.sweeps.work import Unit

RETRIES = 2
"""How often a unit that raised an error is started again in one command (arbitrary)."""

RESTARTS = 20
"""Restarts of a unit whose process or machine died: a weekend on spot machines (arbitrary)."""

POLL_EVERY = 5.0
"""Seconds between two questions to the store about a run of another command (arbitrary)."""


class UnitSearcher(Searcher):
    """Suggests the units of work that the store does not have.

    Parameters
    ----------
    folder
        The store of the study.
    resolve
        Returns all units as the store has them now, always in the same order.
    say_waiting
        Called whenever the store is asked about runs that units wait for.
    """

    def __init__(
        self,
        folder: Folder,
        resolve: Callable[[], Sequence[Unit]],
        say_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(metric=None, mode=None)
        self._folder, self._resolve, self._say_waiting = folder, resolve, say_waiting
        self._units = list(resolve())
        self._waiting = [i for i, unit in enumerate(self._units) if unit.commit is None]
        self._polled = time.monotonic()
        self._running: dict[str, int] = {}
        self._errors: dict[int, int] = {}  # errors in the store when the unit was suggested
        self._failures: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter()
        self.failed: set[str] = set()
        """Labels of the units that are not tried again."""
        self.superseded_by: str | None = None
        """Label of a unit that another command has begun as well."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the functions: Tune pickles its searcher."""
        return {**vars(self), "_resolve": None, "_say_waiting": None}

    def suggest(self, trial_id: str) -> Any:
        """Return a unit's configuration, None to be asked again, or FINISHED."""
        self._poll()
        for position in self._waiting:
            unit = self._units[position]
            if unit.folder is not None:
                self._waiting.remove(position)
                self._running[trial_id] = position
                self._errors[position] = self._count_errors(position)
                return dict(unit.config)
        # A unit that runs may unblock others, or fail and be suggested again.
        return None if self._running or self._awaits_others() else Searcher.FINISHED

    def _awaits_others(self) -> bool:
        return any(self._units[position].awaits is not None for position in self._waiting)

    def _poll(self) -> None:
        """Ask the store whether another command has committed a run that units wait for."""
        if self._awaits_others() and time.monotonic() - self._polled > POLL_EVERY:
            self._polled = time.monotonic()
            self._units = list(self._resolve())
            if self._awaits_others():
                self._say_waiting()

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Unblock the units that waited for this one, or suggest it again if it failed."""
        position = self._running.pop(trial_id, None)
        if position is None:
            return
        if error and not self._is_committed(position):
            self._note_failure(position)
        elif result and result.get("superseded"):
            # Two commands at one study would take each other's units without end; the later one
            # keeps them.
            self.superseded_by = self._units[position].label
            self._waiting.clear()
        elif self._units[position].unblocks:
            self._units = list(self._resolve())

    def _note_failure(self, position: int) -> None:
        """Suggest the unit again, unless it has failed or died too often."""
        if self._count_errors(position) > self._errors[position] or not self._is_writable():
            self._failures[position] += 1
        else:
            self._deaths[position] += 1
        if self._failures[position] <= RETRIES and self._deaths[position] <= RESTARTS:
            self._waiting.append(position)
        else:
            self.failed.add(self._units[position].label)

    def _is_writable(self) -> bool:
        """Return whether a failed unit could write its error; on a full disk it could not."""
        try:
            self._folder.check_writable()
        except StoreError:
            return False
        return True

    def _is_committed(self, position: int) -> bool:
        """Return whether a unit is committed; its process may have died after the commit."""
        return read_commit(self._folder_of(position)) is not None

    def _count_errors(self, position: int) -> int:
        return len((self._folder_of(position) / ERRORS).files())

    def _folder_of(self, position: int) -> Folder:
        return self._folder / str(self._units[position].folder)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the store has the state of the study."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the store has the state of the study."""
