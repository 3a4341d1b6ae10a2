"""The Ray cluster of a study: connect to it, count its machines, check that they see the store.

Ray does not tell a driver what its autoscaler can start. `autoscaling_config` reads it from the
file that the autoscaler was started with, which lies on the head, where a study's driver runs.

A Ray that a study starts for itself listens on the loopback alone, its metrics too, and has no
dashboard. Ray has no public option for that: in a process without multi-node clusters it binds to
127.0.0.1. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1 lets it bind to the machine's address.

Map: `connect`, `is_connected`; `autoscaling_config`; `check_shared` and `check_workers`, whether
all nodes can use the folder or the bucket of a study.
"""

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sampimp.errors import ResourceError, StoreError
from sampimp.store.location import Folder
from sampimp.sweeps.machines import (
    Cluster,
    Machines,
    check_answers,
    find_address,
    machines_to_come,
    named_address,
)

# Ray reads these when it is imported. A study reports no usage, and does not fill a terminal.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output has tables at verbose=0 too

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def connect(address: str | None = None) -> Cluster:
    """Connect to a Ray cluster, and return its machines; do nothing in a process that is connected.

    Parameters
    ----------
    address
        As `ray.init` takes it; "local" for a cluster of this process, "auto" for the cluster that
        this machine is a node of. None: the environment's RAY_ADDRESS, else "auto", else "local".

    Raises
    ------
    ResourceError
        No cluster answers at the address.
    """
    start = partial(
        ray.init, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True
    )
    named = named_address(address)
    address = find_address(address)
    local = address == "local"
    _bind_to_loopback(local)
    with warnings.catch_warnings(), _kept_sigterm():
        warnings.simplefilter("ignore")  # Ray's own deprecations, of no use to a user
        if local:
            try:
                start(address="local", include_dashboard=False)
            except Exception as error:  # Ray raises no class of its own
                raise ResourceError(
                    expected="Ray to start on this machine",
                    got=str(error).strip().split("\n")[0],
                    where="this machine",
                    todo="run the same command again when less else runs here; Ray's messages are "
                    "in /tmp/ray/session_latest/logs",
                ) from None
        else:
            try:
                check_answers(address)
                start(address=address)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ResourceError(
                    expected="a Ray cluster that answers",
                    got=str(error).strip().split("\n")[0],
                    where=f"address {address or named}",
                    todo="start it (ray up cluster.yaml, or ray start --head), or run on this "
                    "machine alone: --address local",
                ) from None
    origin = f"Ray cluster at {address}" if named else "Ray cluster that runs on this machine"
    origin = "Ray started here" if local else origin
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # `Progress` shows failures
    machines = tuple(
        Machines(1, node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    )
    config = {} if local else autoscaling_config(ray.get_runtime_context().gcs_address)
    return Cluster(origin, machines, machines_to_come(config, machines), started_here=local)


_MULTI_NODE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_BINDS_AS_TOLD = _MULTI_NODE in os.environ


def _bind_to_loopback(local: bool) -> None:
    """Let the Ray that this process starts listen on 127.0.0.1, unless the environment says more.

    The processes that Ray starts read the variable; in this one it was read by `import ray`.
    """
    if _BINDS_AS_TOLD:
        return
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = not local
    if local:
        os.environ[_MULTI_NODE] = "0"
    else:
        os.environ.pop(_MULTI_NODE, None)


@contextlib.contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: `ray.init` sets others.

    One of them is C++ code, which prints a stack trace and aborts the process.
    """
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def is_connected() -> bool:
    """Return whether this process is connected to a Ray cluster."""
    return bool(ray.is_initialized())


def autoscaling_config(address: str) -> dict[str, Any]:
    """Return the configuration of a cluster's autoscaler; empty unless it runs on this machine.

    The command line of the autoscaler's process names the file and the address of its cluster.
    (Ray Data reads it from an entry of the head's store that Ray 2.60 never writes.)
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
            continue  # a process that has ended, or of another user
    return {}


def _on_node(task: Any, node_id: str) -> Any:
    """Bind a remote function to one node."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return task.options(scheduling_strategy=strategy)


def check_shared(path: Path) -> None:
    """Raise StoreError unless each node of the cluster reads the same file as this process."""
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
    answers = {address: _on_node(task, node).remote() for node, address in nodes.items()}
    blind = []
    for address, answer in answers.items():
        with contextlib.suppress(ray.exceptions.RayError):  # the node has left meanwhile
            if not ray.get(answer):
                blind.append(address)
    if blind:
        raise StoreError(
            expected="a folder that every node of the cluster sees",
            got=f"one that {', '.join(blind)} cannot read, or where its files differ",
            where=str(path.parent),
            todo="choose an --out on a file system that all nodes share, or s3://BUCKET/NAME",
        )


def check_workers(folder: Folder) -> None:
    """Raise StoreError unless every node of the cluster can use the bucket, as this process can.

    A worker has the environment that Ray was started with on its node, and that node's ~/.aws.
    """
    task = ray.remote(num_cpus=0)(Folder.check_writable)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    try:
        ray.get([_on_node(task, node["NodeID"]).remote(folder) for node in nodes])
    except RayTaskError as error:
        if not isinstance(error.cause, StoreError):
            raise
        raise StoreError(
            expected=f"{error.cause.expected}, on every node of the cluster",
            got=error.cause.got,
            where=f"{error.cause.where}, asked from a worker",
            todo=f"{error.cause.todo}; do this on each node before Ray is started there",
        ) from None
