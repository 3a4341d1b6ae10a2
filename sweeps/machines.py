"""Machines, and how many trials they have room for; without Ray.

A cluster is the machines that run now and those that its autoscaler may start: a cluster that
scales from zero has no room for a trial until a trial waits for it. `sampimp.sweeps.cluster` reads
both from Ray; `this_machine` counts the machine of the process.

Map: `Machines` (some machines of one kind), `Cluster`, `this_machine`, `machines_to_come` (from the
autoscaler's configuration), `find_address`, `named_address` and `noted_address` (where a cluster
is).
"""

import math
import os
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sampimp.sweeps.quantities import format_count


@dataclass(frozen=True)
class Machines:
    """Some machines of one kind."""

    count: int
    cpus: float
    """CPUs of each; infinite where they are unknown until Ray runs on the machine."""
    gpus: float
    """GPUs of each."""

    def room(self, cpus: int, gpus: float) -> int:
        """Return how many trials of so many CPUs and GPUs run on them at a time.

        Trials can share a GPU. No trial uses fractions of two GPUs, or two machines.

        Examples
        --------
        >>> Machines(2, cpus=8, gpus=2).room(cpus=1, gpus=0.4)  # two on each of four GPUs
        8
        >>> Machines(4, cpus=2, gpus=0).room(cpus=3, gpus=0)
        0
        """
        if math.isinf(self.cpus):
            return self.count
        trials = self.cpus // cpus
        if gpus:
            by_gpu = self.gpus // gpus if gpus >= 1 else self.gpus * math.floor(1 / gpus)
            trials = min(trials, by_gpu)
        return self.count * int(trials)


@dataclass(frozen=True)
class Cluster:
    """The machines that a study runs on."""

    origin: str
    """Which cluster it is, in words."""
    machines: tuple[Machines, ...]
    """The machines that run now."""
    to_come: tuple[Machines, ...] = ()
    """The machines that its autoscaler may start in addition, as far as that is known."""
    started_here: bool = False
    """Whether it is this machine alone, started for this process."""

    def room(self, cpus: int, gpus: float) -> int:
        """Return how many trials run at a time once all machines have started."""
        return sum(machines.room(cpus, gpus) for machines in (*self.machines, *self.to_come))

    def __str__(self) -> str:
        nodes = sum(machines.count for machines in self.machines)
        text = f"{self.origin}: {format_count(nodes, 'nodes')}, {_total(self.machines)}"
        if self.to_come:
            more = sum(machines.count for machines in self.to_come)
            known = not any(math.isinf(machines.cpus) for machines in self.to_come)
            text += f"; up to {more} more" + (f" with {_total(self.to_come)}" if known else "")
        return text


def _total(machines: Iterable[Machines]) -> str:
    kinds = list(machines)
    cpus, gpus = (sum(kind.count * getattr(kind, name) for kind in kinds) for name in _RESOURCES)
    return f"{cpus:g} CPUs, {gpus:g} GPUs"


_RESOURCES = ("cpus", "gpus")


def this_machine(origin: str) -> Cluster:
    """Return the machine of this process, with the CPUs that the process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    machine = Machines(1, cpus=cpus, gpus=torch.cuda.device_count())
    return Cluster(origin, (machine,), started_here=True)


def machines_to_come(
    config: Mapping[str, Any], present: Iterable[Machines]
) -> tuple[Machines, ...]:
    """Return the machines that the autoscaler may start in addition to those that run.

    Parameters
    ----------
    config
        The autoscaler's configuration, as `ray up` prepares it.
    present
        The machines that run, the head among them.

    Examples
    --------
    >>> machines_to_come(
    ...     {
    ...         "max_workers": 16,
    ...         "available_node_types": {
    ...             "head": {"resources": {"CPU": 0}, "max_workers": 0},
    ...             "spot": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 8},
    ...         },
    ...     },
    ...     [Machines(1, 0, 0), Machines(1, 4, 1)],
    ... )
    (Machines(count=7, cpus=4, gpus=1),)
    """
    running = list(present)
    left = config.get("max_workers", 0) - (len(running) - 1)
    to_come = []
    for kind in config.get("available_node_types", {}).values():
        resources = kind.get("resources") or {}
        # The provider for on-premises machines states no resources.
        cpus, gpus = resources.get("CPU", 0 if resources else math.inf), resources.get("GPU", 0)
        same = sum((machine.cpus, machine.gpus) == (cpus, gpus) for machine in running)
        count = min(left, kind.get("max_workers", 0) - same)
        if count > 0:
            left -= count
            to_come.append(Machines(count, cpus, gpus))
    return tuple(to_come)


def named_address(address: str | None) -> str | None:
    """Return the address that an option or the environment names; None if neither does."""
    return address or os.environ.get("RAY_ADDRESS")


def find_address(address: str | None) -> str | None:
    """Return the address of the cluster that a study uses: "local" if it starts its own Ray.

    None if "auto" is named, and this machine is not a node of a cluster.
    """
    named = named_address(address)
    if named not in (None, "auto"):
        return named
    return noted_address() or ("local" if named is None else None)


def address_file() -> Path:
    """Return the file in which `ray start` notes the address of its cluster.

    Ray 2.60 keeps it as `ray_current_cluster` in the folder `ray` of /tmp, or of RAY_TMPDIR or
    TMPDIR; `address="auto"` reads it. Ray has no public function that returns this path.
    """
    variables = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    named = [os.environ[name] for name in variables if name in os.environ]
    default = tempfile.gettempdir() if os.name == "nt" else "/tmp"
    return Path(named[0] if named else default) / "ray" / "ray_current_cluster"


def noted_address() -> str | None:
    """Return the address of the cluster that this machine is a node of; None if there is none.

    Ray's own "auto" also returns a cluster that another driver has started for itself, and that
    ends with that driver.
    """
    file = address_file()
    if not file.is_file():
        return None
    address = file.read_text().strip()
    try:
        check_answers(address)
    except ConnectionError:
        return None  # the cluster was killed
    return address


def check_answers(address: str | None) -> None:
    """Raise ConnectionError if nothing listens at HOST:PORT; Ray would try without end."""
    if address is None:
        raise ConnectionError("this machine is not a node of a cluster")
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return  # an address in a form that only Ray can resolve
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ConnectionError(f"no answer at {address}: {error.strerror or error}") from error
