"""What the tests of the sweeps share: a small Ray cluster, one tiny study, ways to run another.

A cluster is started here and never looked for, so that a study which runs on this machine has
nothing to do with the tests; and it listens on the loopback alone.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
from processes import Driver
from rich.console import Console

from sampimp.sweeps import estimate, full_study, run
from sampimp.sweeps.machines import Cluster, Machines
from sampimp.sweeps.options import parse

TINY = (
    *("--preset", "digits", "--hidden", "16", "--epochs", "3", "--batch-size", "25"),
    *("--reference-seeds", "1"),
)
"""What every study of these tests is: digits, 16 units, three epochs of 60 batches."""

FIVE_TRIALS = (*TINY, "--strategies", "nlo", "rand", "--seeds", "1", "2")
"""The reference run, two that wait for it, and two that do not."""

ONE_BY_ONE = ("--max-concurrent", "1")
"""One process, for trials that take less time than another process needs to start."""

RunStudy = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Options of a tiny study."""
    return TINY


class Finished(NamedTuple):
    """The tiny study, as the one command left it."""

    out: Path
    arguments: tuple[str, ...]
    code: int
    text: str
    """What it printed, on standard output and standard error."""


@pytest.fixture(scope="session")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`FIVE_TRIALS`, as a person runs it on a cluster; not to be changed, but copied."""
    out = tmp_path_factory.mktemp("finished") / "study"
    address = ray.get_runtime_context().gcs_address
    driver = Driver(out, (*FIVE_TRIALS, "--address", address))
    try:
        return Finished(out, FIVE_TRIALS, *driver.communicate())
    finally:
        driver.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two CPUs on loopback, started once for all tests."""
    mine = not ray.is_initialized()
    if mine:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # as `connect` does
    yield Cluster("Ray of the tests", (Machines(1, cpus=2, gpus=0),))
    if mine:
        ray.shutdown()


@pytest.fixture
def run_study(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> RunStudy:
    """Run a study on the tests' cluster; return its exit code and what it printed."""
    monkeypatch.setattr(run, "connect", lambda address: cluster)
    return partial(_run, ONE_BY_ONE)


@pytest.fixture
def run_untrained(monkeypatch: pytest.MonkeyPatch) -> RunStudy:
    """Run a study that must train nothing, on machines that are not there."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this study was to train nothing")

    machines = Cluster("no cluster", (Machines(1, cpus=2, gpus=0),))
    monkeypatch.setattr(run, "connect", lambda address: machines)
    monkeypatch.setattr(estimate, "this_machine", lambda origin: machines)
    monkeypatch.setattr(estimate, "noted_address", lambda: None)
    monkeypatch.setattr(run, "train", refuse)
    return partial(_run, ())


def _run(more: Sequence[str], out: Path, *arguments: str) -> tuple[int, str]:
    console = Console(file=StringIO(), width=200)
    code = full_study.run_or_describe(parse([*more, *arguments, "--out", str(out)]), console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]
