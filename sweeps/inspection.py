"""The state of each trial of a study, from its store alone.

A committed trial is done, or has diverged. One with a file that cannot be read is unreadable, and
the others are shown all the same. Of any other trial, the newest of its attempts,
checkpoints and errors says whether it runs, has stopped or has failed. A trial that sorts by a
reference run is blocked until that run is committed.

Records of influence, retraining and subsets have no plan: those that were begun are listed. One
whose run was trained again, with other values, is outdated.

Map: `Status`, `STATES`, `inspect`; `RecordStatus`, `inspect_records`.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from sampimp.errors import RecordError
from sampimp.store.attempts import LastSign, last_sign
from sampimp.store.influence_layouts import INFLUENCE_FOLDER, KINDS, layout_of
from sampimp.store.influence_records import read_records
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial, read_commits
from sampimp.sweeps.quantities import format_clock

QUIET_TIME = 60.0
"""Seconds without a write, beyond the time of three epochs, after which a trial counts as stopped
(arbitrary)."""

STATES = ("done", "diverged", "running", "stopped", "failed", "waiting", "blocked", "unreadable")


class Status(NamedTuple):
    """The state of a trial."""

    trial: PlannedTrial
    state: str
    """One of `STATES`."""
    detail: str = ""
    """Epoch, attempt, host, error or reference, in words."""


def inspect(folder: Folder, plan: Plan) -> list[Status]:
    """Return the state of each trial of the plan.

    In a bucket, only the start of each COMMIT.json is read: 10,000 of them take seconds.
    """
    unreadable: dict[str, str] = {}

    def refuse(name: str, error: RecordError) -> None:
        unreadable[name] = f"{error.where}: {error.summary}"

    commits = read_commits(folder, refuse=refuse, outcomes=not folder.is_local)
    trials = plan.resolve(commits, refuse)

    def read_sign(trial: PlannedTrial) -> LastSign | None:
        if trial.commit is not None or trial.trial_id in (None, *unreadable):
            return None
        try:
            return last_sign(folder / "trials" / str(trial.trial_id))
        except RecordError as error:
            refuse(str(trial.trial_id), error)
            return None

    with ThreadPoolExecutor(16) as pool:  # an object store answers in tens of milliseconds
        signs = list(pool.map(read_sign, trials))
    statuses: list[Status] = []
    references: dict[str, Status] = {}
    for trial, sign in zip(trials, signs, strict=True):  # references come first
        if trial.trial_id is None:
            reference = references[trial.config.dataset]
            status = Status(trial, "blocked", f"by {reference.trial.label}: {reference.state}")
        elif trial.trial_id in unreadable:
            status = Status(trial, "unreadable", unreadable[trial.trial_id])
        else:
            status = _judge(trial, sign, plan.training.epochs)
        if plan.is_reference(trial.config):
            references[trial.config.dataset] = status
        statuses.append(status)
    return statuses


def _judge(trial: PlannedTrial, sign: LastSign | None, epochs: int) -> Status:
    if trial.commit is not None:
        diverged = trial.commit["diverged_epoch"]
        if diverged is None:
            return Status(trial, "done")
        return Status(trial, "diverged", f"in epoch {diverged}")
    if sign is None:
        return Status(trial, "waiting")
    return Status(trial, *_judge_sign(sign, "epoch", epochs))


def _judge_sign(sign: LastSign, noun: str, steps: int) -> tuple[str, str]:
    """Return state and details of what was begun and is not committed."""
    where = f"{noun} {sign.epoch} of {steps}, attempt {sign.attempt} on {sign.host}"
    if sign.error is not None:
        return "failed", f"{where}: {sign.error}"
    ago, quiet = time.time() - sign.time, QUIET_TIME + 3 * sign.epoch_seconds
    if ago < -quiet:  # of no use: it would count as running until this clock gets there
        ahead = f"last sign {format_clock(-ago)} from now: its clock, or this one, is wrong"
        return "stopped", f"{where}, {ahead}"
    state = "running" if ago < quiet else "stopped"
    return state, f"{where}, last sign {format_clock(max(0.0, ago))} ago"


class RecordStatus(NamedTuple):
    """The state of a record of influence, retraining or subsets."""

    name: str
    """The name of its folder."""
    kind: str
    """One of `sampimp.store.influence_layouts.KINDS`."""
    state: str
    """done, running, stopped, failed, unreadable or outdated."""
    detail: str = ""


def inspect_records(folder: Folder, plan: Plan) -> list[RecordStatus]:
    """Return the state of each record of influence, retraining or subsets that was begun."""
    place = folder / INFLUENCE_FOLDER
    names = place.folders()
    if not names:
        return []
    unreadable: dict[str, str] = {}

    def refuse(name: str, error: RecordError) -> None:
        unreadable[name] = f"{error.where}: {error.summary}"

    trials = plan.resolve(read_commits(folder, refuse=refuse), refuse)
    records = {
        record.name
        for each in read_records(folder, plan, trials, refuse).values()
        for record in each
    }
    commits = read_commits(folder, INFLUENCE_FOLDER, refuse)
    statuses = []
    for name in names:
        if name in unreadable:
            statuses.append(RecordStatus(name, "unknown", "unreadable", unreadable[name]))
            continue
        if name in commits:
            kind, state = commits[name]["kind"], "done" if name in records else "outdated"
            detail = "" if name in records else "its run was trained again, with other values"
            statuses.append(RecordStatus(name, kind, state, detail))
            continue
        try:
            status = _inspect_record(place / name, name, plan)
        except RecordError as error:
            refuse(name, error)
            status = RecordStatus(name, "unknown", "unreadable", unreadable[name])
        statuses += [status] if status else []
    return statuses


def _inspect_record(place: Folder, name: str, plan: Plan) -> RecordStatus | None:
    """Return the state of a record that is not committed, or None if it is not begun."""
    sign, begun = last_sign(place), place.read_json("trial.json")
    if sign is None or begun is None:  # it is being made, or a remnant of it is deleted
        return None
    if begun.get("kind") is None or begun["dataset"] not in plan.datasets:
        raise RecordError(
            expected=f"a record of one of the kinds {', '.join(KINDS)}, of a planned data set",
            got="another one",
            where=f"{place}/trial.json",
            todo="delete this record's folder and run the command that began it again",
        )
    steps = layout_of(begun, plan.layout(begun["dataset"])).steps
    noun = "retraining" if begun["kind"] == "retrain" else "step"
    return RecordStatus(name, begun["kind"], *_judge_sign(sign, noun, steps))
