"""The committed influence records of a study, matched with the runs that they were computed from.

A record belongs to a run if its commit names the run's folder and the digest of the run's record: a
run that was trained again with other values, under another configuration or by another version, has
none of the old records.

Map: `CommittedRecord`; `read_records`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sampimp.errors import RecordError
from sampimp.schema import RecordLayout
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
            _require_lists(commit, f"{place}/COMMIT.json")
            layout = layout_of(commit, plan.layout(run.config.dataset))
            check_history(commit, layout, f"{place}/COMMIT.json", complete=True)
        except RecordError as error:
            if refuse is None:
                raise
            refuse(name, error)
            continue
        record = CommittedRecord(place, commit, layout)
        records.setdefault(commit["trial"], []).append(record)
    return records


_EQUAL_LISTS = (("targets", "units"), ("budgets", "variants"))
"""Entries of an identity with as many values as each other."""


def _require_lists(commit: Mapping[str, Any], where: str) -> None:
    """Raise RecordError for lists of an identity that are empty, repeat a name or differ in length.

    The shape of a record is made from them.
    """
    for names in (*_EQUAL_LISTS, ("removals",), ("seeds",), ("curvatures",), ("dampings",)):
        lists = [commit[name] for name in names if name in commit and commit["kind"] != "states"]
        lengths = {len(values) for values in lists}
        repeated = bool(lists) and len(set(lists[0])) < len(lists[0])
        if len(lengths) > 1 or 0 in lengths or repeated:
            raise RecordError(
                expected=f"{' and '.join(names)} of one length, each value once",
                got=f"lengths {', '.join(map(str, sorted(lengths)))}" + ", repeated" * repeated,
                where=where,
                todo="delete this record's folder and run the command that wrote it again",
            )
