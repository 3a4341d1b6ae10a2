"""Find damage in a study's store by comparing chunks with digests; withdraw damaged trials.

A trial that is withdrawn counts as missing, so that the command that trained the study trains it
again.

Map: `verify`, `verify_records` (influence, retraining, subsets), `verify_datasets`, `withdraw_all`.
"""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import track

from sampimp.errors import RecordError, printable
from sampimp.store.commits import withdraw
from sampimp.store.datasets import (
    StoredSource,
    open_source,
    read_source,
    require_planned_shape,
)
from sampimp.store.influence_layouts import INFLUENCE_FOLDER
from sampimp.store.influence_records import read_records
from sampimp.store.integrity import find_damage
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.store.snapshots import SNAPSHOTS, stored_snapshots
from sampimp.sweeps.inspection import Status


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
        damage = list(find_damage(where, trial.commit or {}, layout))
        try:
            damage += stored_snapshots(where, layout, snapshots.get(trial_id, {})).damage()
        except RecordError as error:
            damage.append(f"{SNAPSHOTS}: {error.summary}")
        if damage:
            damaged[trial_id] = damage
    _print_damage(damaged, f"{len(committed)} committed trials", console)
    return damaged


def verify_records(
    folder: Folder, plan: Plan, statuses: Sequence[Status], console: Console
) -> dict[str, list[str]]:
    """Do the same for records of influence, retraining and subsets; return the damage by name."""
    trials = [status.trial for status in statuses]
    damaged: dict[str, list[str]] = {}

    def refuse(name: str, error: RecordError) -> None:
        damaged[name] = [f"{error.where}: {error.summary}"]

    by_run = read_records(folder, plan, trials, refuse)
    records = [record for each in by_run.values() for record in each]
    if not records and not damaged:
        return {}
    for record in track(records, "Verifying", console=console, transient=True):
        if damage := list(find_damage(record.folder, record.commit, record.layout)):
            damaged[record.name] = damage
    _print_damage(damaged, f"{len(records)} records of influence, retraining and subsets", console)
    return damaged


def _print_damage(damaged: Mapping[str, list[str]], what: str, console: Console) -> None:
    for name, damage in damaged.items():
        words = f"{name} is damaged: {damage[0]}"
        console.print(printable(words), style="bold", markup=False, highlight=False)
        if damage[1:]:
            words = f"  and {len(damage) - 1} more places, to {damage[-1]}"
            console.print(printable(words), markup=False, highlight=False)
    result = f"{len(damaged)} are damaged." if damaged else "every chunk is as it was written."
    console.print(f"{what} verified: {result}", highlight=False)


def verify_datasets(folder: Folder, plan: Plan, committed: bool, console: Console) -> bool:
    """Compare every chunk of the stored data sets with its digest; return whether all are right.

    Parameters
    ----------
    folder, plan
        The study.
    committed
        Whether trials are committed: then a data set that is missing is damage.
    console
        Where the results are printed.
    """
    sound = True
    for key, info in plan.datasets.items():
        where = folder / "datasets" / f"{key}.zarr"
        try:
            stored = open_source(where, info.digest, info.chunks)
            if stored is not None:
                require_planned_shape(stored, info.sample_count, info.test_count, info.input_shape)
            missing = ["it is missing, or not complete"] if stored is None and committed else []
            damage = [*missing, *(stored.damage() if stored else ())]
            if stored is not None and not stored.is_verifiable:
                read_source(where)
        except RecordError as error:
            damage = [f"{error.summary}, {error.where}"]
        if damage:
            sound = False
            more = f" and {len(damage) - 1} more places" if damage[1:] else ""
            words = printable(f"data set {key} is damaged: {damage[0]}{more}")
            console.print(words, style="bold", markup=False, highlight=False)
            console.print(
                f"  Delete {where}: the command that trained the study stores it again.",
                markup=False,
                highlight=False,
            )
        elif stored is not None:
            console.print(f"data set {key} {_soundness(stored)}", highlight=False)
    return sound


def _soundness(stored: StoredSource) -> str:
    if stored.is_verifiable:
        return "verified: every chunk is as it was written."
    return (
        "is unverified when it is read: it was stored without digests of its chunks. Its overall "
        "digest is correct."
    )


def withdraw_all(
    folder: Folder, trial_ids: Sequence[str], console: Console, records: Sequence[str] = ()
) -> None:
    """Take damaged trials and their snapshots, and damaged influence records, out of a study."""
    snapshots = folder.read_json(SNAPSHOTS)
    if snapshots:
        left = {name: entry for name, entry in snapshots.items() if name not in trial_ids}
        folder.write_json(SNAPSHOTS, left)
    for trial_id in trial_ids:
        withdraw(folder / "trials" / trial_id)
    for name in records:
        withdraw(folder / INFLUENCE_FOLDER / name)
    if trial_ids:
        console.print(
            f"{len(trial_ids)} withdrawn: the command that trained the study trains them again.",
            highlight=False,
        )
    if records:
        console.print(
            f"{len(records)} withdrawn: the command that computed them computes them again.",
            highlight=False,
        )
