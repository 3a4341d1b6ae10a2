"""What all tests share: Ray's environment, and how they run on two cores."""

import gc
import os
import tempfile

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Read by Ray when it is imported: without clusters of many machines it takes 127.0.0.1, whatever
# the machine's own address is.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# By default its workers give way to all others (15), so that the tests beside them decide when a
# study, which is waited for, goes on.
os.environ.setdefault("RAY_worker_niceness", "0")

# Two processes on two cores: further threads took a fifth more CPU time, to wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ray's workers have the environment that Ray was started with. So the tests of a bucket tell them
# its server and credentials by these files, which are there while `test_s3.py` runs.
os.environ["AWS_CONFIG_FILE"] = f"{tempfile.gettempdir()}/sampimp-tests-{os.getpid()}/config"
os.environ["AWS_SHARED_CREDENTIALS_FILE"] = f"{os.environ['AWS_CONFIG_FILE']}-credentials"

import dask
import pytest
from xdist.scheduler import LoadScopeScheduling

# Collecting the tests makes millions of objects and no garbage; looking for some took 2.2 of 9.8 s.
gc.disable()

# Threads cost a quarter of the analyses' time where the arrays are as small as here; those that
# tests/analysis/test_schedulers.py compares are named there.
dask.config.set(scheduler="synchronous")

RAY = (
    "tests/test_replay.py",
    *(
        f"tests/sweeps/test_{name}.py"
        for name in (
            *("cluster", "consolidate", "door", "full_study", "ingest", "s3"),
            *("readme", "schedulers", "scoring", "study", "team"),
        )
    ),
)
"""Where one Ray cluster and one finished study are shared by many tests."""

BY_FILE = ("tests/analysis/", "tests/integrations/")
"""Where the tests of a file share results or reports, or libraries that take seconds to import."""


class Halves(LoadScopeScheduling):
    """Give the tests that share what is dear to one process, and all others to who is free.

    xdist's own groups are marks that it writes into a test's id, which pytest 9.2 does not heed.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(RAY):
            return "ray"
        return nodeid.partition("::")[0] if nodeid.startswith(BY_FILE) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Halves:
    """Called by xdist."""
    config.option.loadscopereorder = False  # the order is that of `pytest_collection_modifyitems`
    return Halves(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the two longest first, one for each process: what shares Ray, and the chaos."""
    items.sort(key=lambda item: not item.nodeid.startswith((*RAY, "tests/chaos/")))


def pytest_collection_finish() -> None:
    """Look for garbage again, in what the tests make."""
    gc.freeze()
    gc.enable()
