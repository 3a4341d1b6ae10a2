"""Which machines: the Ray cluster that is named, else one that runs, else one started here.

A cluster is what runs now (`machines`) and what its autoscaler may start (`to_come`): one that
scales from none has no room for a trial until a trial waits for it. Ray does not tell a driver what
can come, so it is read from the file that the autoscaler was started with, which lies on the head,
where a study's driver runs.
"""

import contextlib
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sampimp.errors import ResourceError, StoreError

# Read by Ray when it is imported: a study tells nobody that it runs, and does not fill a terminal.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints tables at verbose=0 too

import ray
from ray._common.utils import get_ray_address_file
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class Machines:
    """Some machines of one kind."""

    count: int
    cpus: float
    """CPUs of each; infinite where only Ray on the machine itself will tell."""
    gpus: float
    """GPUs of each."""

    def room(self, cpus: int, gpus: float) -> int:
        """Return how many trials of so many CPUs and GPUs run on them at a time.

        Trials share a GPU, and none lies across two or across machines.

        Examples
        --------
        >>> Machines(2, cpus=8, gpus=2).room(cpus=1, gpus=0.4)  # two on each of four GPUs
        8
        >>> Machines(4, cpus=2, gpus=0).room(cpus=3, gpus=0)
        0
        """
        if math.isinf(self.cpus):
            return self.count
        each = self.cpus // cpus
        if gpus:
            each = min(each, self.gpus // gpus if gpus >= 1 else self.gpus * math.floor(1 / gpus))
        return self.count * int(each)


@dataclass(frozen=True)
class Cluster:
    """The machines that a study runs on."""

    origin: str
    """How it was found."""
    machines: tuple[Machines, ...]
    """What runs now."""
    to_come: tuple[Machines, ...] = ()
    """What its autoscaler may start beside them, as far as that can be known."""
    started_here: bool = False
    """Whether it is this machine alone, and for this process."""

    def room(self, cpus: int, gpus: float) -> int:
        """Return how many trials run at a time once all machines have come."""
        return sum(machines.room(cpus, gpus) for machines in (*self.machines, *self.to_come))

    def __str__(self) -> str:
        nodes = sum(machines.count for machines in self.machines)
        text = f"{self.origin}: {nodes} node{'s' if nodes != 1 else ''}, {_total(self.machines)}"
        if self.to_come:
            more = sum(machines.count for machines in self.to_come)
            known = not any(math.isinf(machines.cpus) for machines in self.to_come)
            text += f"; up to {more} more" + (f" with {_total(self.to_come)}" if known else "")
        return text


def _total(machines: Iterable[Machines]) -> str:
    cpus, gpus = (
        sum(kind.count * getattr(kind, name) for kind in machines) for name in ("cpus", "gpus")
    )
    return f"{cpus:g} CPUs, {gpus:g} GPUs"


def connect(address: str | None = None) -> Cluster:
    """Connect to a Ray cluster and say what it has.

    Parameters
    ----------
    address
        As `ray.init` takes it; "local" for a cluster of its own, "auto" for the one that this
        machine is a node of. None: the environment's RAY_ADDRESS, else "auto", else "local".

    Raises
    ------
    ResourceError
        No cluster answers there.
    """
    start = partial(ray.init, log_to_driver=False, logging_level=logging.ERROR)
    given = address or os.environ.get("RAY_ADDRESS")
    address = noted_address() if given in (None, "auto") else given
    local = address == "local" or (address is None and given is None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own deprecations, of no use to a user
        if local:
            start(address="local", include_dashboard=False)
        else:
            try:
                check_answers(address)
                start(address=address)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ResourceError(
                    expected="a Ray cluster that answers",
                    got=str(error).strip().split("\n")[0],
                    where=f"address {address or given}",
                    todo="start it (ray up cluster.yaml, or ray start --head), or run on this "
                    "machine alone: --address local",
                ) from None
    origin = f"Ray cluster at {address}" if given else "Ray cluster that runs on this machine"
    origin = "Ray started here" if local else origin
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # failures are shown by `Progress`
    machines = tuple(
        Machines(1, node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    )
    config = {} if local else autoscaling_config(ray.get_runtime_context().gcs_address)
    to_come = machines_to_come(config, machines)
    return Cluster(origin, machines, to_come, started_here=local)


NOTED = Path(get_ray_address_file(None))
"""Where `ray start` notes the address of its cluster."""


def noted_address() -> str | None:
    """Return the address of the cluster that this machine is a node of; None if there is none.

    Ray's own "auto" also finds one that another driver has started for itself, which ends with it.
    """
    if not NOTED.is_file():
        return None
    address = NOTED.read_text().strip()
    try:
        check_answers(address)
    except ConnectionError:
        return None  # it was killed
    return address


def check_answers(address: str | None) -> None:
    """Raise ConnectionError if nobody listens at HOST:PORT; Ray would try for ever."""
    if address is None:
        raise ConnectionError("this machine is a node of none")
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return  # what only Ray understands
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ConnectionError(f"nobody answers at {address}: {error.strerror or error}") from error


def autoscaling_config(address: str) -> dict[str, Any]:
    """Return what a cluster's autoscaler was told; nothing unless it runs on this machine.

    The command line of its process names the file and the address of its cluster. (Ray Data asks a
    place in the head's store, which nothing in Ray 2.60 fills.)
    """
    option = "--autoscaling-config="
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_text().split("\0")
            if f"--gcs-address={address}" in words:
                for word in words:
                    if word.startswith(option):
                        path = Path(word.removeprefix(option)).expanduser()
                        return yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError):
            continue  # a process that has ended, or is another person's
    return {}


def machines_to_come(
    config: Mapping[str, Any], present: Iterable[Machines]
) -> tuple[Machines, ...]:
    """Return what the autoscaler may start, beside the machines that run.

    Parameters
    ----------
    config
        Its configuration, prepared by `ray up`.
    present
        What runs, the head among it.

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
    found = []
    for kind in config.get("available_node_types", {}).values():
        resources = kind.get("resources") or {}
        # The provider of one's own machines states none.
        cpus, gpus = resources.get("CPU", 0 if resources else math.inf), resources.get("GPU", 0)
        same = sum((one.cpus, one.gpus) == (cpus, gpus) for one in running)
        count = min(left, kind.get("max_workers", 0) - same)
        if count > 0:
            left -= count
            found.append(Machines(count, cpus, gpus))
    return tuple(found)


def check_shared(path: Path) -> None:
    """Raise StoreError unless each node of the cluster reads the same file that is here."""
    text = path.read_bytes()

    def reads() -> bool:
        try:
            return path.read_bytes() == text
        except OSError:
            return False

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return
    task = ray.remote(num_cpus=0, max_retries=0)(reads)
    answers = {
        address: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote()
        for node, address in nodes.items()
    }
    blind = []
    for address, answer in answers.items():
        with contextlib.suppress(ray.exceptions.RayError):  # a node that went meanwhile
            if not ray.get(answer):
                blind.append(address)
    if blind:
        raise StoreError(
            expected="a folder that every node of the cluster sees",
            got=f"one that {', '.join(blind)} cannot read, or reads otherwise",
            where=str(path.parent),
            todo="choose an --out on a file system that all nodes share, or s3://BUCKET/NAME",
        )
