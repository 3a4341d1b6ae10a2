"""What all tests share: Ray's environment, and how they run on two cores."""

import os
import tempfile

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Read by Ray when it is imported: without clusters of many machines it takes 127.0.0.1, whatever
# the machine's own address is.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

# Ray's workers have the environment that Ray was started with. So the tests of a bucket tell them
# its server and credentials by these files, which are there while `test_s3.py` runs.
os.environ["AWS_CONFIG_FILE"] = f"{tempfile.gettempdir()}/sampimp-tests-{os.getpid()}/config"
os.environ["AWS_SHARED_CREDENTIALS_FILE"] = f"{os.environ['AWS_CONFIG_FILE']}-credentials"

import dask
import pytest
from xdist.scheduler import LoadScopeScheduling

# Threads cost a quarter of the analyses' time where the arrays are as small as here; those that
# tests/analysis/test_schedulers.py compares are named there.
dask.config.set(scheduler="synchronous")

FINISHED = tuple(
    f"tests/sweeps/test_{name}.py"
    for name in ("full_study", "consolidate", "snapshots", "s3", "schedulers", "workers")
)
"""Where one finished study is looked at by many tests."""

RAY = ("tests/sweeps/", "tests/test_replay.py", "tests/chaos/")
"""Where one Ray cluster is shared by many tests, and the longest test: the large comes first."""

BY_FILE = ("tests/analysis/", "tests/sampimp/test_trainers.py")
"""Where the tests of a file share results or reports, or libraries that take seconds to import."""


class Halves(LoadScopeScheduling):
    """Give the tests that share what is dear to one process, and all others to who is free.

    xdist's own groups are marks that it writes into a test's id, which pytest 9.2 does not heed.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(FINISHED):
            return "finished"
        if nodeid.startswith(RAY):
            return "ray"
        return nodeid.partition("::")[0] if nodeid.startswith(BY_FILE) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Halves:
    """Called by xdist."""
    return Halves(config, log)
