"""Settings of all tests: the environment of Ray, and the distribution over two processes."""

import gc
import os
import tempfile

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Read when Ray is imported: without multi-node clusters Ray binds to 127.0.0.1, whatever the
# machine's address is.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# By default Ray's workers have niceness 15, and a study that a test waits for would yield to the
# tests in the other process.
os.environ.setdefault("RAY_worker_niceness", "0")

# Two processes on two cores: more threads took a fifth more CPU time, spent in waiting.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ray's workers have the environment with which Ray was started. The tests of a bucket pass its
# server and credentials through these files, which exist while `test_s3.py` runs.
os.environ["AWS_CONFIG_FILE"] = f"{tempfile.gettempdir()}/sampimp-tests-{os.getpid()}/config"
os.environ["AWS_SHARED_CREDENTIALS_FILE"] = f"{os.environ['AWS_CONFIG_FILE']}-credentials"

import dask
import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

# An example may take long beside other work; a test as a whole has its time limit.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

# Collecting the tests makes millions of objects and no garbage; the collector took 2.2 of 9.8 s.
gc.disable()

# With arrays as small as in the tests, threads took a quarter of the analyses' time. The tests in
# tests/analysis/test_schedulers.py choose their scheduler.
dask.config.set(scheduler="synchronous")

RAY = (
    "tests/test_replay.py",
    *(
        f"tests/sweeps/test_{name}.py"
        for name in (
            *("cluster", "consolidate", "door", "full_study", "influence_on_ray", "ingest", "s3"),
            *("schedulers", "scoring", "shutdown", "study", "team"),
        )
    ),
)
"""Test files that share one Ray cluster and one finished study."""

BY_FILE = ("tests/analysis/", "tests/browser/", "tests/integrations/", "tests/test_wheel.py")
"""Folders and files whose tests share results, an environment, or libraries slow to import."""


class TwoQueues(LoadScopeScheduling):
    """Run the tests that share Ray in one process, and the others in whichever is free.

    xdist's groups are suffixes of a test's id, which pytest 9.2 ignores.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(RAY):
            return "ray"
        return nodeid.partition("::")[0] if nodeid.startswith(BY_FILE) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> TwoQueues:
    """Called by xdist."""
    config.option.loadscopereorder = False  # the order is that of `pytest_collection_modifyitems`
    return TwoQueues(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the two longest groups first, one in each process: Ray's tests, and the chaos test."""
    items.sort(key=lambda item: not item.nodeid.startswith((*RAY, "tests/chaos/")))


def pytest_collection_finish() -> None:
    """Turn the garbage collector on again."""
    gc.freeze()
    gc.enable()
