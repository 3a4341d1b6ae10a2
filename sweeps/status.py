"""How far a study is: what is committed, running, stopped, failed or blocked, and by what.

python sweeps/status.py OUT               from the store alone, while it runs or later
python sweeps/status.py OUT --verify      also compare every chunk with its digest
python sweeps/status.py OUT --withdraw    and take what is damaged out, to be trained again
"""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console
from rich.progress import track

from sampimp.errors import RecordError, UserError
from sampimp.store.attempts import LastSign, last_sign
from sampimp.store.datasets import open_source, read_source
from sampimp.store.integrity import find_damage, withdraw
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial, read_commits, require_plan
from sampimp.store.snapshots import SNAPSHOTS, stored_snapshots
from sampimp.sweeps.door import run_door
from sampimp.sweeps.progress import format_clock

QUIET = 60.0
"""Seconds, beside the time of three epochs, that a running trial may leave no sign (arbitrary)."""

STATES = ("done", "diverged", "running", "stopped", "failed", "waiting", "blocked")


class Status(NamedTuple):
    """Where a trial is."""

    trial: PlannedTrial
    state: str
    """One of `STATES`."""
    detail: str = ""


def inspect(folder: Folder, plan: Plan) -> list[Status]:
    """Return where each trial of the plan is."""
    trials = plan.resolve(read_commits(folder))

    def sign(trial: PlannedTrial) -> LastSign | None:
        if trial.commit is not None or trial.trial_id is None:
            return None
        return last_sign(folder / "trials" / trial.trial_id)

    with ThreadPoolExecutor(16) as pool:  # an object store answers in tens of milliseconds
        signs = list(pool.map(sign, trials))
    statuses: list[Status] = []
    references: dict[str, Status] = {}
    for trial, seen in zip(trials, signs, strict=True):  # references come first
        if trial.trial_id is None:
            reference = references[trial.config.dataset]
            status = Status(trial, "blocked", f"by {reference.trial.label}: {reference.state}")
        else:
            status = _judge(trial, seen, plan.training.epochs)
        if plan.is_reference(trial.config):
            references[trial.config.dataset] = status
        statuses.append(status)
    return statuses


def _judge(trial: PlannedTrial, seen: LastSign | None, epochs: int) -> Status:
    if trial.commit is not None:
        diverged = trial.commit["diverged_epoch"]
        return (
            Status(trial, "done")
            if diverged is None
            else Status(trial, "diverged", f"in epoch {diverged}")
        )
    if seen is None:
        return Status(trial, "waiting")
    where = f"epoch {seen.epoch} of {epochs}, attempt {seen.attempt} on {seen.host}"
    if seen.error is not None:
        return Status(trial, "failed", f"{where}: {seen.error}")
    ago = max(0.0, time.time() - seen.time)  # clocks differ from machine to machine
    state = "running" if ago < QUIET + 3 * seen.epoch_seconds else "stopped"
    return Status(trial, state, f"{where}, last sign {format_clock(ago)} ago")


def describe(folder: Folder, statuses: Sequence[Status], console: Console) -> None:
    """Print the counts, and a line for each trial that there is something to say of."""
    with console.status("Adding up its size"):
        size = folder.size()
    counts = Counter(status.state for status in statuses)
    words = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    console.print(f"{folder}: {size / 1e9:.2f} GB", markup=False, highlight=False)
    console.print(f"{len(statuses)} trials: {words}", highlight=False)
    for state in STATES:
        chosen = [status for status in statuses if status.state == state and status.detail]
        for detail, labels in _grouped(chosen).items():
            console.print(
                f"  {state:<9} {', '.join(labels)} {detail}", markup=False, highlight=False
            )
    if counts["failed"]:
        console.print("The traceback of a failure is in trials/ID/errors/ATTEMPT.json.")


def _grouped(statuses: Sequence[Status]) -> dict[str, list[str]]:
    """Return the labels of trials by what is said of them: all that one reference blocks, say."""
    groups: dict[str, list[str]] = {}
    for status in statuses:
        groups.setdefault(status.detail, []).append(status.trial.label)
    return groups


def verify(
    folder: Folder, plan: Plan, statuses: Sequence[Status], console: Console
) -> dict[str, list[str]]:
    """Compare every chunk of the committed trials with its digest; return the damage by trial."""
    snapshots = folder.read_json(SNAPSHOTS) or {}
    committed = [status.trial for status in statuses if status.trial.commit is not None]
    damaged: dict[str, list[str]] = {}
    for trial in track(committed, "Verifying", console=console, transient=True):
        trial_id, layout = str(trial.trial_id), plan.layout(trial.config.dataset)
        where = folder / "trials" / trial_id
        scored = stored_snapshots(where, layout, snapshots.get(trial_id, {}))
        found = [*find_damage(where, trial.commit or {}, layout), *scored.damage()]
        if found:
            damaged[trial_id] = found
    for trial_id, found in damaged.items():
        console.print(f"[bold]{trial_id} is damaged[/]: {found[0]}", highlight=False)
        if found[1:]:
            console.print(f"  and {len(found) - 1} more places, to {found[-1]}", highlight=False)
    console.print(
        f"{len(committed)} committed trials verified: "
        + (f"{len(damaged)} are damaged." if damaged else "every chunk is as it was written."),
        highlight=False,
    )
    return damaged


def verify_datasets(folder: Folder, plan: Plan, committed: bool, console: Console) -> bool:
    """Compare every chunk of the stored data sets with its digest; return whether all are right.

    `committed` says whether trials are: then the data sets have to be there.
    """
    sound = True
    for key, info in plan.datasets.items():
        where = folder / "datasets" / f"{key}.zarr"
        try:
            stored = open_source(where, info.digest, info.chunks)
            missing = ["it is missing, or not complete"] if stored is None and committed else []
            damage = [*missing, *(stored.damage() if stored else ())]
            if stored is not None and not stored.is_verifiable:
                read_source(where)
        except RecordError as error:
            damage = [f"{error.summary}, {error.where}"]
        if damage:
            sound = False
            more = f" and {len(damage) - 1} more places" if damage[1:] else ""
            console.print(f"[bold]data set {key} is damaged[/]: {damage[0]}{more}", highlight=False)
            console.print(
                f"  Delete {where}: the command that trained the study stores it again.",
                markup=False,
                highlight=False,
            )
        elif stored is not None and stored.is_verifiable:
            console.print(
                f"data set {key} verified: every chunk is as it was written.", highlight=False
            )
        elif stored is not None:
            console.print(
                f"data set {key} is unverified when it is read: it was stored before chunks had "
                "digests. As a whole, it is as it was written.",
                highlight=False,
            )
    return sound


def withdraw_all(folder: Folder, trial_ids: Sequence[str], console: Console) -> None:
    """Take damaged trials out of a study, and their snapshots."""
    snapshots = folder.read_json(SNAPSHOTS)
    if snapshots:
        left = {name: entry for name, entry in snapshots.items() if name not in trial_ids}
        folder.write_json(SNAPSHOTS, left)
    for trial_id in trial_ids:
        withdraw(folder / "trials" / trial_id)
    console.print(
        f"{len(trial_ids)} withdrawn: the command that trained the study trains them again.",
        highlight=False,
    )


def report(
    out: tyro.conf.Positional[str],
    /,
    verify_chunks: Annotated[bool, tyro.conf.arg(name="verify")] = False,
    withdraw_damaged: Annotated[bool, tyro.conf.arg(name="withdraw")] = False,
) -> int:
    """Say how far a study is, from its store alone.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    verify_chunks
        Also read every chunk and compare it with its digest.
    withdraw_damaged
        Verify, and take what is damaged out of the study: the next run trains it again.
    """
    console = Console(soft_wrap=True)
    folder = Folder.of(out)
    plan = require_plan(folder)
    statuses = inspect(folder, plan)
    describe(folder, statuses, console)
    damaged, sound = {}, True
    if verify_chunks or withdraw_damaged:
        damaged = verify(folder, plan, statuses, console)
        committed = any(status.trial.commit is not None for status in statuses)
        sound = verify_datasets(folder, plan, committed, console)
    if damaged and withdraw_damaged:
        withdraw_all(folder, list(damaged), console)
    elif damaged:
        console.print("--withdraw takes them out of the study, to be trained again.")
    return 1 if damaged or not sound else 0


def main(arguments: list[str]) -> int:
    """Run the command line; return 1 where something is damaged, 2 for a mistake."""
    try:
        command = tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(report)
        return tyro.cli(command, args=arguments, prog="status.py")
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False)
        return 2


if __name__ == "__main__":
    run_door(main)
