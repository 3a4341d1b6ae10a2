"""Perform units of work on committed runs on a Ray cluster, or describe them.

Map: `perform_or_describe`; `machines_for` (what a unit takes of the machines), `run_on_cluster`,
`describe_units` (`--dry-run`).
"""

import time
from collections.abc import Sequence

from rich.console import Console

from sampimp.errors import require_package
from sampimp.store.plan import Plan
from sampimp.sweeps.derived_study import DerivedStudy
from sampimp.sweeps.machines import Cluster, this_machine
from sampimp.sweeps.options import MachineOptions
from sampimp.sweeps.preflight import check_cluster, check_disk
from sampimp.sweeps.quantities import format_bytes, format_count, format_duration
from sampimp.sweeps.work import Unit

WAITING_EVERY = 30.0
"""Seconds between two lines about a run that the command waits for (arbitrary)."""


def perform_or_describe(
    study: DerivedStudy,
    address: str | None,
    max_concurrent: int | None,
    console: Console,
    *,
    dry_run: bool,
) -> int:
    """Perform the units that the store lacks, or print them; return the exit code."""
    machines = machines_for(study.plan, address, max_concurrent)
    if dry_run:
        return describe_units(study, machines, console)
    require_package("ray", "study")
    return run_on_cluster(study, machines, console)


def machines_for(plan: Plan, address: str | None, max_concurrent: int | None) -> MachineOptions:
    """Return what a unit takes of the machines: what its run took, or its bytes may differ."""
    machines = MachineOptions(
        address=address,
        max_concurrent=max_concurrent,
        cpus_per_trial=plan.training.threads,
        gpus_per_trial=1.0 if plan.training.device == "cuda" else 0.0,
    )
    machines.check_resources()
    return machines


def run_on_cluster(
    study: DerivedStudy,
    machines: MachineOptions,
    console: Console,
) -> int:
    """Perform the units that the store lacks on a Ray cluster; return 0 if none is missing, else 1.

    Parameters
    ----------
    study
        The units.
    machines
        Which cluster, and what a unit takes of it.
    console
        Where progress is shown.

    Raises
    ------
    UserError
        Something is wrong with the store, the machines or the disk.
    """
    from sampimp.sweeps.cluster import connect, is_connected  # here: a dry run needs no Ray

    units = study.units.resolve()
    missing = [unit for unit in units if unit.commit is None]
    if missing:
        is_first = not is_connected()
        cluster = connect(machines.address)
        if is_first:
            console.print(f"{cluster}.", markup=False, highlight=False)
        check_cluster(machines, cluster)
        study.folder.check_writable()
        check_disk(study.folder, sum(map(study.units.bytes_of, missing)))
        _tune(study, units, machines, cluster, console)
        units = study.units.resolve()
    return _conclude(units, study.words[0], console)


def _tune(
    study: DerivedStudy,
    units: Sequence[Unit],
    machines: MachineOptions,
    cluster: Cluster,
    console: Console,
) -> None:
    # As above.
    from sampimp.sweeps.progress import Progress
    from sampimp.sweeps.searcher import UnitSearcher
    from sampimp.sweeps.tuning import tune_units

    for line in study.waiting_words(units):
        console.print(f"{line}.", markup=False, highlight=False)
    said = time.monotonic()

    def say_waiting() -> None:
        nonlocal said
        if time.monotonic() - said > WAITING_EVERY:
            said = time.monotonic()
            for line in study.waiting_words(study.units.resolve()):
                console.print(f"{line}.", markup=False, highlight=False)

    searcher = UnitSearcher(study.folder, study.units.resolve, say_waiting)
    missing = sum(unit.commit is None for unit in units)
    room = cluster.room(machines.cpus_per_trial, machines.gpus_per_trial)
    tune_units(
        searcher,
        Progress(units, searcher.failed, searcher.committed, console, study.words),
        folder=study.folder,
        plan=study.plan,
        sources=study.sources,
        worker={"CPU": float(machines.cpus_per_trial), "GPU": machines.gpus_per_trial},
        cluster=cluster,
        slots=min(room, machines.max_concurrent or room) or 1,
        at_once=machines.max_concurrent or missing,
    )


def _conclude(units: Sequence[Unit], noun: str, console: Console) -> int:
    """Print how many units are committed; return 0 if none is missing, else 1."""
    missing = [unit.label for unit in units if unit.commit is None]
    grown = [
        f"{unit.label}: {target} from epoch {epoch} back"
        for unit in units
        if unit.commit is not None
        for target, epoch in unit.commit.get("growth_epochs", {}).items()
    ]
    if not units:
        console.print("All that was asked for is committed already.", highlight=False)
        return 0
    done = len(units) - len(missing)
    console.print(f"{done} of {len(units)} {noun} are committed.", highlight=False)
    if grown:
        shown = "; ".join(grown[:4]) + (f"; and {len(grown) - 4} more" if grown[4:] else "")
        console.print(
            f"The derivative grew more than a million times on its way back, and says little about "
            f"a finite removal there: {shown}.",
            markup=False,
            highlight=False,
        )
    if missing:
        console.print(f"[bold]{len(missing)} are missing[/]: {', '.join(missing)}.")
        console.print(
            "`sampimp status OUT` says why; the same command again retries them.", highlight=False
        )
    return 1 if missing else 0


def describe_units(study: DerivedStudy, machines: MachineOptions, console: Console) -> int:
    """Print the units that the store lacks, with their time and storage; return 0."""
    cluster = this_machine("This machine")
    console.print(f"{cluster}.", highlight=False)
    units = study.units.resolve()
    missing = [unit for unit in units if unit.commit is None]
    console.print(f"Store     {study.folder}", markup=False, highlight=False)
    for unit in missing:
        identity = unit.config["identity"]
        names = identity.get("removals") or identity.get("targets") or []
        shown = ", ".join(names[:6]) + (f", ... ({len(names)} in all)" if names[6:] else "")
        line = f"Missing   {unit.label}, {format_count(unit.steps, study.words[1])}" + (
            f": {shown}" * bool(names)
        )
        console.print(line, markup=False, highlight=False)
    for line in study.waiting_words(units):
        console.print(f"          {line}", markup=False, highlight=False)
    if not missing:
        console.print("All that was asked for is committed already.", highlight=False)
        return 0
    with console.status("Measuring a step"):
        seconds = sum(unit.steps * study.step_seconds(unit) for unit in missing)
    room = cluster.room(machines.cpus_per_trial, machines.gpus_per_trial)
    slots = max(1, min(room, machines.max_concurrent or room, len(missing)))
    duration = format_duration(seconds / slots)
    console.print(f"Time      about {duration} on this machine, {slots} at a time", highlight=False)
    needed = sum(map(study.units.bytes_of, missing))
    console.print(f"Storage   at most {format_bytes(needed)}", highlight=False)
    return 0
