"""The scheduler that dask computes with: threads, a dask.distributed cluster, or a Ray cluster.

The graph, and with it the order of every sum, is the same with all three, and so are the results. A
task carries the location and digest of a chunk and opens the store on the machine where it runs:
workers must reach the same folder, or the bucket with their own credentials.

Map: `Scheduler` and `use_scheduler`.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Literal

import dask

from sampimp.errors import ResourceError, require_package

Scheduler = Literal["threads", "distributed", "ray"]

CONNECT_TIMEOUT = "15 s"
"""Time in which a scheduler has to answer before its address counts as wrong (arbitrary)."""


@contextlib.contextmanager
def use_scheduler(scheduler: Scheduler = "threads", address: str | None = None) -> Iterator[None]:
    """Let dask compute with a scheduler inside the context; then stop a cluster started for it.

    Parameters
    ----------
    scheduler
        "threads" of this process; "distributed": the dask.distributed scheduler at `address`;
        "ray": the Ray cluster at `address`.
    address
        Address of a running cluster. Default: DASK_SCHEDULER_ADDRESS or RAY_ADDRESS, else a
        cluster is started on this machine.

    Raises
    ------
    ResourceError
        No scheduler answers at the address, or the package is not installed.

    Examples
    --------
    >>> with use_scheduler("threads"):
    ...     dask.config.get("scheduler")
    'threads'
    """
    if scheduler == "threads":
        with dask.config.set(scheduler="threads"):
            yield
    elif scheduler == "distributed":
        with _distributed(address):
            yield
    else:
        with _ray(address):
            yield


@contextlib.contextmanager
def _distributed(address: str | None) -> Iterator[None]:
    """Compute on a dask.distributed cluster."""
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise ResourceError(
            expected="the package distributed",
            got="none",
            where="option --scheduler",
            todo="pip install 'sampimp[distributed]', here and on the workers",
        ) from None
    address = address or dask.config.get("scheduler-address", None)
    with contextlib.ExitStack() as stack:
        if address is None:
            # Only on this machine, without a dashboard: no port is open to other machines.
            address = stack.enter_context(LocalCluster(host="127.0.0.1", dashboard_address=None))
        try:
            client = stack.enter_context(Client(address, timeout=CONNECT_TIMEOUT))
        except (OSError, ValueError) as error:
            raise _unreachable("a dask.distributed scheduler", address, error) from None
        stack.enter_context(client.as_current())
        # The client registers itself for this thread only; the configuration is for all threads.
        stack.enter_context(dask.config.set(scheduler=client))
        yield


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """Compute on a Ray cluster; if this process is already connected to one, on that."""
    # Ray reads this when it is imported: no usage statistics are sent.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    require_package("ray", "study")
    import ray
    from ray.util.dask import ray_dask_get

    started = not ray.is_initialized()
    if started:
        local = not (address or os.environ.get("RAY_ADDRESS")) or address == "local"
        try:
            ray.init(
                address,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = address or os.environ.get("RAY_ADDRESS")
            raise _unreachable("a Ray cluster", where, error) from None
    try:
        with dask.config.set(scheduler=ray_dask_get):
            yield
    finally:
        if started:
            ray.shutdown()


def _unreachable(what: str, address: object, error: Exception) -> ResourceError:
    """Return the error for a scheduler that does not answer."""
    return ResourceError(
        expected=f"{what} that answers",
        got=str(error).strip().split("\n")[0] or type(error).__name__,
        where=f"address {address}",
        todo="start it, correct --scheduler-address, or omit --scheduler to use this machine's "
        "threads",
    )
