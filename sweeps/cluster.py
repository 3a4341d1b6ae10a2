"""Which machines: the Ray cluster that is named, else one that runs, else one started here."""

import logging
import os
import warnings
from dataclasses import dataclass
from functools import partial

from sampimp.errors import ResourceError

# Read by Ray when it is imported: a study tells nobody that it runs, and does not fill a terminal.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints tables at verbose=0 too

import ray


@dataclass(frozen=True)
class Cluster:
    """The machines that a study runs on."""

    origin: str
    """How it was found."""
    nodes: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        plural = "s" if self.nodes != 1 else ""
        return f"{self.origin}: {self.nodes} node{plural}, {self.cpus:g} CPUs, {self.gpus:g} GPUs"


def connect(address: str | None = None) -> Cluster:
    """Connect to a Ray cluster and say what it has.

    Parameters
    ----------
    address
        As `ray.init` takes it, "local" for a cluster of its own. None: the environment's
        RAY_ADDRESS, else a cluster that runs on this machine, else one that is started here for
        this process alone.

    Raises
    ------
    ResourceError
        The address was given and no cluster answers there.
    """
    start = partial(ray.init, log_to_driver=False, logging_level=logging.ERROR)
    address = address or os.environ.get("RAY_ADDRESS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own deprecations, of no use to a user
        if address == "local":
            start(address="local", include_dashboard=False)
            origin = "Ray started here"
        elif address:
            try:
                start(address=address)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ResourceError(
                    expected="a Ray cluster that answers",
                    got=str(error).strip().split("\n")[0],
                    where=f"address {address}",
                    todo="start it (ray up cluster.yaml, or ray start --head), or leave --address "
                    "and RAY_ADDRESS out to run on this machine",
                ) from None
            origin = f"Ray cluster at {address}"
        else:
            try:
                start(address="auto")
                origin = "Ray cluster that runs on this machine"
            except ConnectionError:
                start(address="local", include_dashboard=False)
                origin = "Ray started here"
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # failures are shown by `Progress`
    resources = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    return Cluster(origin, nodes, resources.get("CPU", 0), resources.get("GPU", 0))
