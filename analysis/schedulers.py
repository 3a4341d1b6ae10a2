"""Where dask computes: this process's threads, a dask.distributed cluster, or a Ray cluster.

The graph, and with it the order of every sum, is the same in all three, and so are the results. A
task carries a place and a digest and opens the store where it runs: the workers have to see the
same folder, or the bucket with credentials of their own.

Map: `Scheduler` and `use_scheduler`.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Literal

import dask

from sampimp.errors import ResourceError

Scheduler = Literal["threads", "distributed", "ray"]

PATIENCE = "15 s"
"""How long a scheduler may take to answer, before its address is taken for wrong (arbitrary)."""


@contextlib.contextmanager
def use_scheduler(scheduler: Scheduler = "threads", address: str | None = None) -> Iterator[None]:
    """Let dask compute there until the context ends, and end what was started for it.

    Parameters
    ----------
    scheduler
        "threads" of this process; "distributed": the dask.distributed scheduler at the address;
        "ray": the Ray cluster at the address.
    address
        Of a cluster that runs. None: that of DASK_SCHEDULER_ADDRESS or RAY_ADDRESS, else one is
        started on this machine.

    Raises
    ------
    ResourceError
        Nobody answers at the address, or the package is not installed.

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
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise ResourceError(
            expected="the package distributed",
            got="none",
            where="option --scheduler",
            todo='pip install -c constraints.txt -e ".[distributed]", here and on the workers',
        ) from None
    address = address or dask.config.get("scheduler-address", None)
    with contextlib.ExitStack() as stack:
        if address is None:
            # Without a dashboard: on this machine alone, and no port that others could see.
            address = stack.enter_context(LocalCluster(host="127.0.0.1", dashboard_address=None))
        try:
            client = stack.enter_context(Client(address, timeout=PATIENCE))
        except (OSError, ValueError) as error:
            raise _unreachable("a dask.distributed scheduler", address, error) from None
        stack.enter_context(client.as_current())
        # Unlike the client's own registration, this holds for the other threads as well.
        stack.enter_context(dask.config.set(scheduler=client))
        yield


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[None]:
    # Read by Ray when it is imported: a study tells nobody that it runs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.util.dask import ray_dask_get

    started = not ray.is_initialized()
    if started:
        own = not (address or os.environ.get("RAY_ADDRESS")) or address == "local"
        try:
            ray.init(
                address,
                include_dashboard=False if own else None,
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
    return ResourceError(
        expected=f"{what} that answers",
        got=str(error).strip().split("\n")[0] or type(error).__name__,
        where=f"address {address}",
        todo="start it, mend --scheduler-address, or leave --scheduler out to use the threads of "
        "this machine",
    )
