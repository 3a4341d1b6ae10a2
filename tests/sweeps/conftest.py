"""What the tests of the sweeps share: a small Ray cluster, one tiny study, ways to run another.

A cluster is started here and never looked for, so that a study which runs on this machine has
nothing to do with the tests; and it listens on the loopback alone.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Read by Ray when it is imported: without clusters of many machines it takes 127.0.0.1, whatever
# the machine's own address is.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import pytest
import ray
from rich.console import Console

from sweeps import study
from sweeps.cluster import Cluster
from sweeps.study import parse

DOOR = Path(study.__file__).with_name("full_study.py")

TINY = (
    *("--preset", "digits", "--hidden", "16", "--epochs", "3", "--batch-size", "25"),
    *("--reference-seeds", "1"),
)
"""What every study of these tests is: digits, 16 units, three epochs of 60 batches."""

FIVE_TRIALS = (*TINY, "--strategies", "nlo", "rand", "--seeds", "1", "2")
"""The reference run, two that wait for it, and two that do not."""

RunStudy = Callable[..., tuple[int, str]]


class Driver:
    """`full_study.py` in a process of its own, with a Ray of its own, that may be killed."""

    def __init__(self, out: Path, arguments: Sequence[str]) -> None:
        command = [sys.executable, str(DOOR), *arguments, "--out", str(out), "--address", "local"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that Ctrl-C can be sent to it and not to the tests
        )
        self._family: set[tuple[int, str]] = set()

    def communicate(self) -> tuple[int, str]:
        """Return its exit code and all that it printed, once it has ended."""
        text, _ = self.process.communicate()  # pytest-timeout ends a test that waits for ever
        return self.process.returncode, text

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for something in the store, noting which processes the driver has by then."""
        while not happened():
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.002)
        self._family |= descendants(self.process.pid)

    def kill(self) -> None:
        """Kill the driver at once, as `kill -9` does; its Ray is left to itself."""
        self.process.kill()
        self.process.wait()

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal sends it to the driver and all that it started."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        """End what is left of it: its own processes, by their ids."""
        if self.process.poll() is None:
            self._family |= descendants(self.process.pid)
            self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        deadline = time.monotonic() + 4  # workers notice and go; Ray's agents need a minute
        while (left := {one for one in self._family if _is_alive(*one)}) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.05)
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(root: int) -> set[tuple[int, str]]:
    """Return the processes below one, each with its start time, which its id alone may outlive."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found, fresh = set(), {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh}
        found |= fresh
    return {(pid, fields[19]) for pid in found if (fields := _stat(pid))}


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name; none if there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _is_alive(pid: int, started: str) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[19] == started and fields[0] != "Z"


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """Start drivers that end with the test."""
    drivers: list[Driver] = []

    def start(out: Path, *arguments: str) -> Driver:
        drivers.append(Driver(out, arguments))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.close()


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
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`FIVE_TRIALS`, run undisturbed as a person runs it; not to be changed, but copied."""
    out = tmp_path_factory.mktemp("finished") / "study"
    driver = Driver(out, FIVE_TRIALS)
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
    yield Cluster("Ray of the tests", nodes=1, cpus=2, gpus=0)
    if mine:
        ray.shutdown()


@pytest.fixture
def run_study(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> RunStudy:
    """Run a study on the tests' cluster; return its exit code and what it printed."""
    monkeypatch.setattr(study, "connect", lambda address: cluster)
    return _run


@pytest.fixture
def run_untrained(monkeypatch: pytest.MonkeyPatch) -> RunStudy:
    """Run a study that must train nothing, on machines that are not there."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this study was to train nothing")

    machines = Cluster("no cluster", nodes=1, cpus=2, gpus=0)
    monkeypatch.setattr(study, "connect", lambda address: machines)
    monkeypatch.setattr(study, "train", refuse)
    return _run


def _run(out: Path, *arguments: str) -> tuple[int, str]:
    console = Console(file=StringIO(), width=200)
    code = study.run(parse([*arguments, "--out", str(out)]), console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]
