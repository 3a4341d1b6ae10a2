"""Choose the unit of work that is next: not committed, all that it waits for committed.

Ray Tune asks a `Searcher` whenever a machine is free. Units that wait for no other come first, so
that the machines are busy meanwhile: the strategies that sort follow once the store has the commit
of their reference run. One call of `fit` performs them all. Where a unit waits for a run that is
trained by another command, the store is asked every `POLL_EVERY` seconds.

A unit that ended without a commit is suggested again, and the new attempt continues from its
newest checkpoint. A unit that failed has written its error into the store; that may happen
`RETRIES` times. A process or machine that dies writes none; that may happen `RESTARTS` times.

Other drivers may perform the same units. A driver takes at its start what is not committed, so that
nobody waits after a crash. From then on it leaves a unit to another driver while that shows life:
it performs its other units, and takes that one over once it has not changed for `QUIET_TIME` and
three epochs. Only the clock of this machine is asked. Each takeover doubles the patience for that
unit, so that drivers whose first epoch takes longer cannot take it from each other for ever.

Map: `UnitSearcher`.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ray.tune.search import Searcher

from sampimp.errors import RecordError, StoreError
from sampimp.store.attempts import Trace, has_failed, last_sign, read_trace
from sampimp.store.commits import find_commit
from sampimp.store.location import Folder
from sampimp.sweeps.inspection import QUIET_TIME
from sampimp.sweeps.work import Unit

RETRIES = 2
"""How often a unit that raised an error is started again in one command (arbitrary)."""

RESTARTS = 20
"""Restarts of a unit whose process or machine died: a weekend on spot machines (arbitrary)."""

POLL_EVERY = 5.0
"""Seconds between two questions to the store about a run of another command (arbitrary)."""


@dataclass
class _Watch:
    """A unit that another driver performs."""

    trace: Trace
    since: float
    """When the trace was seen to change, by the clock of this machine."""
    patience: float
    """Seconds without a change after which the unit is taken over."""
    failed: bool
    """Whether the newest attempt has failed."""


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
        self._seen = self._read_traces()  # as of the start, or of the unit's last end here
        self._others: dict[int, _Watch] = {}
        self._takeovers: Counter[int] = Counter()
        self._polled = time.monotonic()
        self._running: dict[str, int] = {}
        self._failures: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter()
        self.failed: set[str] = set()
        """Labels of the units that are not tried again."""
        self.committed: dict[str, str] = {}
        """Labels of units that were committed without a report: "done" or "diverged"."""

    def _read_traces(self) -> dict[int, Trace]:
        """Return how far the units are that were begun before this driver."""
        ready = {i: self._folder_of(i) for i in self._waiting if self._units[i].folder is not None}
        parents = {PurePosixPath(folder.path).parent for folder in ready.values()}
        begun = {
            str(parent / name)
            for parent in parents
            for name in Folder(self._folder.root, str(parent)).folders()
        }
        return {i: read_trace(folder) for i, folder in ready.items() if folder.path in begun}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the functions: Tune pickles its searcher."""
        return {**vars(self), "_resolve": None, "_say_waiting": None}

    def suggest(self, trial_id: str) -> Any:
        """Return a unit's configuration, None to be asked again, or FINISHED."""
        self._poll()
        position = self._next()
        if position is not None:
            self._running[trial_id] = position
            seen = self._seen.setdefault(position, Trace())
            return {**self._units[position].config, "seen": list(seen)}
        # A unit that runs may unblock others, or fail and be suggested again.
        is_over = not (self._running or self._others or self._awaits_others())
        return Searcher.FINISHED if is_over else None

    def _next(self) -> int | None:
        """Return the position of the next unit; those of other drivers come last."""
        for position in self._waiting:
            if self._units[position].folder is not None:
                self._waiting.remove(position)
                return position
        for position, watch in self._others.items():
            if watch.failed or time.monotonic() - watch.since > watch.patience:
                del self._others[position]
                self._takeovers[position] += 1
                self._seen[position] = watch.trace
                return position
        return None

    def _awaits_others(self) -> bool:
        return any(self._units[position].awaits is not None for position in self._waiting)

    def _poll(self) -> None:
        """Ask the store about runs that units wait for, and about units of other drivers."""
        awaits_others = self._awaits_others()
        if not (awaits_others or self._others) or time.monotonic() - self._polled <= POLL_EVERY:
            return
        self._polled = time.monotonic()
        for position in list(self._others):
            self._watch(position)
        if awaits_others:
            self._units = list(self._resolve())
            if self._awaits_others():
                self._say_waiting()

    def _watch(self, position: int) -> None:
        """Note how far another driver is with a unit."""
        folder, watch = self._folder_of(position), self._others.pop(position, None)
        if commit := find_commit(folder):
            self._note_commit(position, commit)
            return
        trace = read_trace(folder)
        if watch is None or watch.trace != trace:
            seconds = 0.0
            with suppress(RecordError):  # a file that is damaged
                seconds = getattr(last_sign(folder), "epoch_seconds", 0.0)
            patience = (QUIET_TIME + 3 * seconds) * 2 ** self._takeovers[position]
            watch = _Watch(trace, time.monotonic(), patience, failed=False)
        watch.failed = has_failed(folder, trace.attempt)
        self._others[position] = watch

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Unblock the units that waited for this one, suggest it again, or leave it to another."""
        position = self._running.pop(trial_id, None)
        if position is None:
            return
        is_superseded = bool(result and result.get("superseded"))
        if not error and not is_superseded:
            self._unblock(position)
        elif commit := find_commit(self._folder_of(position)):
            self._note_commit(position, commit)
        elif error:
            self._note_failure(position)
        else:
            self._watch(position)

    def _note_commit(self, position: int, commit: Mapping[str, Any]) -> None:
        """Count a unit whose commit was not reported, and unblock those that waited for it."""
        unit = self._units[position]
        self.committed[unit.label] = unit._replace(commit=commit).state
        self._unblock(position)

    def _unblock(self, position: int) -> None:
        if self._units[position].unblocks:
            self._units = list(self._resolve())

    def _note_failure(self, position: int) -> None:
        """Suggest the unit again, unless it has failed or died too often."""
        folder, attempt = self._folder_of(position), self._seen[position].attempt + 1
        if has_failed(folder, attempt) or not self._is_writable():
            self._failures[position] += 1
        else:
            self._deaths[position] += 1
        trace = read_trace(folder)
        if self._failures[position] > RETRIES or self._deaths[position] > RESTARTS:
            self.failed.add(self._units[position].label)
        elif trace.attempt > attempt:  # another driver has taken it over
            self._watch(position)
        else:
            self._seen[position] = trace
            self._waiting.append(position)

    def _is_writable(self) -> bool:
        """Return whether a failed unit could write its error; on a full disk it could not."""
        try:
            self._folder.check_writable()
        except StoreError:
            return False
        return True

    def _folder_of(self, position: int) -> Folder:
        return self._folder / str(self._units[position].folder)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the store has the state of the study."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the store has the state of the study."""
