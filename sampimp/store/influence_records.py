"""The committed influence records of a study, matched with the runs that they were computed from.

A record belongs to a run if its commit names the run's folder and the digest of the run's record: a
run that was trained again with other values, under another configuration or by another version, has
none of the old records.

Map: `CommittedRecord`; `read_records`, `derived_commits`; `require_record` (a single one).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sampimp.errors import RecordError
from sampimp.schema import Layout, RecordLayout
from sampimp.store.commits import require_commit
from sampimp.store.file_types import is_coordinate
from sampimp.store.influence_layouts import INFLUENCE_FOLDER, layout_of
from sampimp.store.integrity import record_digest
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial, Refuse, read_commits
from sampimp.store.variables import StoredFiles, StoredVariable, check_history, stored_variable


@dataclass(frozen=True)
class CommittedRecord:
    """A committed record of influence, states or retrainings."""

    folder: Folder
    """OUT/influence/ID."""
    commit: Mapping[str, Any]
    layout: RecordLayout

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.path.rpartition("/")[2]

    @property
    def kind(self) -> str:
        """One of `sampimp.store.influence_layouts.KINDS`."""
        return str(self.commit["kind"])

    def array(self, name: str) -> StoredVariable:
        """Return one of its arrays."""
        return StoredVariable.of(self.folder, name, self.layout, self.commit)

    def variable(self, name: str) -> StoredVariable | StoredFiles:
        """Return one of its variables, arrays or files."""
        return stored_variable(self.folder, name, self.layout, self.commit)


def read_records(
    folder: Folder, plan: Plan, trials: Sequence[PlannedTrial], refuse: Refuse | None = None
) -> dict[str, list[CommittedRecord]]:
    """Return the records of each committed run, by its trial_id, sorted by name.

    Parameters
    ----------
    folder
        The store of the study.
    plan
        Its plan.
    trials
        The plan, matched with the commits.
    refuse
        As for `sampimp.store.plan.read_commits`.

    Raises
    ------
    RecordError
        A COMMIT.json cannot be read, or does not fit the record's shape.
    """
    commits = read_commits(folder, INFLUENCE_FOLDER, refuse)
    runs = {trial.trial_id: trial for trial in trials if trial.commit is not None}
    records: dict[str, list[CommittedRecord]] = {}
    for name, commit in sorted(commits.items()):
        run = runs.get(commit["trial"])
        if run is None or run.commit is None or commit["record"] != record_digest(run.commit):
            continue
        place = folder / INFLUENCE_FOLDER / name
        try:
            record = _checked(place, commit, plan.layout(run.config.dataset))
        except RecordError as error:
            if refuse is None:
                raise
            refuse(name, error)
            continue
        records.setdefault(commit["trial"], []).append(record)
    return records


def derived_commits(
    folder: Folder, plan: Plan, trials: Sequence[PlannedTrial]
) -> dict[str, Mapping[str, Any]]:
    """Return the commits that `read_records` finds, by name: what a command need not compute again.

    Parameters and errors are those of `read_records`.
    """
    records = read_records(folder, plan, trials)
    return {record.name: record.commit for each in records.values() for record in each}


def require_record(study: Folder, name: str, kind: str, run: Layout) -> CommittedRecord:
    """Return a committed record that another one is computed from.

    Parameters
    ----------
    study
        The store of the study.
    name
        The name of the record's folder.
    kind
        One of `sampimp.store.influence_layouts.KINDS`.
    run
        The shape of its run's record.

    Raises
    ------
    RecordError
        It is not committed, is of another kind, or does not fit its shape.
    """
    place = study / INFLUENCE_FOLDER / name
    commit = require_commit(place)
    if commit["kind"] != kind:
        raise RecordError(
            expected=f"a record of the kind {kind}",
            got=str(commit["kind"]),
            where=f"{place}/COMMIT.json",
            todo="delete this record's folder and run the command that wrote it again",
        )
    return _checked(place, commit, run)


def _checked(place: Folder, commit: Mapping[str, Any], run: Layout) -> CommittedRecord:
    """Return a record whose commit fits the shape that its identity states."""
    _require_lists(commit, f"{place}/COMMIT.json")
    layout = layout_of(commit, run)
    check_history(commit, layout, f"{place}/COMMIT.json", complete=True)
    return CommittedRecord(place, commit, layout)


_TARGETS = ("targets", "units")
_LISTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "influence": (_TARGETS,),
    "probes": (_TARGETS,),
    "fixed-point": (_TARGETS, ("curvatures",), ("dampings",)),
    "retrain": (_TARGETS, ("removals",)),
    "subset": (("budgets", "variants"), ("seeds",)),
}
"""Lists in the identity of each kind: those with as many values as each other are together."""


def _require_lists(commit: Mapping[str, Any], where: str) -> None:
    """Raise RecordError for lists of an identity that cannot be coordinates of the cube.

    The shape of a record is made from them.
    """
    for names in _LISTS.get(commit["kind"], ()):
        lists = [commit[name] for name in names]
        lengths = {len(values) for values in lists}
        wrong = {
            f"lengths {', '.join(map(str, sorted(lengths)))}": len(lengths) > 1 or 0 in lengths,
            "repeated ones": len(set(lists[0])) < len(lists[0]),
            "a name with ' (', as before a smoothing": names == _TARGETS
            and any(" (" in name for name in lists[0]),
            "too long ones, or with NUL": not all(
                is_coordinate(list(map(str, values))) for values in lists
            ),
        }
        if any(wrong.values()):
            raise RecordError(
                expected=f"{' and '.join(names)} of one length, each value once",
                got=", ".join(words for words, holds in wrong.items() if holds),
                where=where,
                todo="delete this record's folder and run the command that wrote it again",
            )
