"""Fixtures: a small Ray cluster, a finished tiny study, and functions that run others.

The tests start a cluster and never look for one, so that they do not use the cluster of a study
that runs on this machine. It listens on the loopback alone.
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
    *("--influence", "--subsets"),
)
"""Options of every study of these tests: digits, 16 units, three epochs, without influence."""

FIVE_TRIALS = (*TINY, "--strategies", "nlo", "rand", "--seeds", "1", "2")
"""The reference run, two trials that wait for it, and two that do not."""

ONE_BY_ONE = ("--max-concurrent", "1")
"""One process: these trials take less time than the start of a second process."""

RunStudy = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Options of a tiny study."""
    return TINY


class Finished(NamedTuple):
    """The tiny study after its command has ended."""

    out: Path
    arguments: tuple[str, ...]
    code: int
    text: str
    """Standard output and standard error of the command."""


@pytest.fixture(scope="session")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`FIVE_TRIALS`, run by the command on a cluster; tests copy it and do not change it."""
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
    starts_ray = not ray.is_initialized()
    if starts_ray:
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
    if starts_ray:
        ray.shutdown()


@pytest.fixture
def run_study(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> RunStudy:
    """Run a study on the tests' cluster; return its exit code and output."""
    monkeypatch.setattr(run, "join_cluster", lambda address: cluster)
    return partial(_run, ONE_BY_ONE)


@pytest.fixture
def run_untrained(monkeypatch: pytest.MonkeyPatch) -> RunStudy:
    """Run a study that must train nothing, on a cluster that does not exist."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this study must train nothing")

    machines = Cluster("no cluster", (Machines(1, cpus=2, gpus=0),))
    monkeypatch.setattr(run, "join_cluster", lambda address: machines)
    monkeypatch.setattr(estimate, "this_machine", lambda origin: machines)
    for module in (estimate, run):
        monkeypatch.setattr(module, "find_address", lambda address: address or "local")
    monkeypatch.setattr(run, "train", refuse)
    return partial(_run, ())


def _run(more: Sequence[str], out: Path, *arguments: str) -> tuple[int, str]:
    console = Console(file=StringIO(), width=200)
    code = full_study.run_or_describe(parse([*more, *arguments, "--out", str(out)]), console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]
