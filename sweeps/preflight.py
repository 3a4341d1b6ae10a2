"""Checks before a study begins: its store, its machines, its disk; without Ray.

Each raises an error with the option to change, before anything is written or trained. The checks
that ask the nodes of a Ray cluster are in `sampimp.sweeps.cluster`.

Map: `check_out`, `check_cluster`, `check_disk`.
"""

import shutil
from pathlib import Path

from sampimp.errors import ResourceError, StoreError
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.store.plan_files import find_plan
from sampimp.sweeps.machines import Cluster
from sampimp.sweeps.options import MachineOptions
from sampimp.sweeps.quantities import format_bytes


def check_out(folder: Folder) -> Plan | None:
    """Return the plan that the folder holds already; None if there is none, or a damaged one.

    Raises
    ------
    StoreError
        The folder is a file, cannot be reached, or holds something other than a study.
    """
    if folder.is_local and Path(str(folder)).exists() and not Path(str(folder)).is_dir():
        raise StoreError(
            expected="a folder",
            got="a file",
            where=str(folder),
            todo="choose another --out",
        )
    folder.check_reachable()
    if folder.is_empty():
        return None
    stored = find_plan(folder)
    if stored.plan is None and not stored.damaged:
        raise StoreError(
            expected="an empty folder, or a study with its study.json",
            got="a folder that holds something else",
            where=str(folder),
            todo="choose another --out; nothing there was touched",
        )
    return stored.plan


def check_cluster(config: MachineOptions, cluster: Cluster) -> None:
    """Raise ResourceError if the cluster has no room for a trial, now or after it has grown."""
    cpus, gpus = config.cpus_per_trial, config.gpus_per_trial
    workers = config.workers_per_trial
    grows = not cluster.started_here and config.max_concurrent
    if cluster.room(cpus, gpus) < workers and not grows:
        raise ResourceError(
            expected=f"a node with {cpus} CPUs"
            + (f" and {gpus:g} GPU" if gpus else "")
            + (f" for each of {workers} workers" if workers > 1 else " a trial"),
            got=f"room for {cluster.room(cpus, gpus)}" if workers > 1 else "none",
            where=str(cluster),
            todo="lower --cpus-per-trial, leave --gpus-per-trial out to train on CPUs, or name a "
            "cluster that has them; if this cluster grows when trials wait, set the number of "
            "trials that it grows to: --max-concurrent",
        )


def check_disk(folder: Folder, needed: int) -> None:
    """Raise ResourceError if a local disk has less room than the needed bytes."""
    if not folder.is_local:
        return
    free = shutil.disk_usage(str(folder)).free
    if free < needed:
        raise ResourceError(
            expected=f"{format_bytes(needed)} free for the trials that are missing",
            got=format_bytes(free),
            where=str(folder),
            todo="free some, choose another --out, or store fewer --parameters-every",
        )
