"""Start, watch and kill the processes of a study: its driver and the descendants of it.

Map: `Driver`, `Family`; `descendants`, `command_of`, `kill`, `is_alive`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sampimp.sweeps import full_study, influence, subset

DOOR = full_study.__file__
TRAIN = str(Path(__file__).with_name("train.py"))
"""The same command without the report, which takes as long as the rest."""

INFLUENCE = influence.__file__
SUBSET = subset.__file__


class Family:
    """A process and its descendants, to be ended together."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._members: set[tuple[int, str]] = set()

    def alive(self) -> list[int]:
        """Return the descendants seen so far that still run."""
        self._members |= descendants(self._root)
        return [pid for pid, started in self._members if is_alive(pid, started)]

    def end(self, patience: float) -> None:
        """Wait at most `patience` seconds for the processes to end; kill those that are left."""
        deadline = time.monotonic() + patience
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            kill(pid)


class Driver:
    """A command in a process that may be killed; it starts Ray unless an address is named."""

    def __init__(
        self,
        out: str | Path,
        arguments: Sequence[str],
        env: Mapping[str, str] | None = None,
        door: str = DOOR,
    ) -> None:
        if "--address" not in arguments:
            arguments = (*arguments, "--address", "local")
        place = ["--out", str(out)] if door in (DOOR, TRAIN) else [str(out)]
        self.process = subprocess.Popen(
            [sys.executable, door, *place, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=None if env is None else dict(env),
            start_new_session=True,  # so that Ctrl-C can be sent to it and not to the tests
        )
        self.family = Family(self.process.pid)

    def communicate(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and the output."""
        text, _ = self.process.communicate()  # pytest-timeout ends a test that waits for ever
        return self.process.returncode, text

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for a condition, then note the processes of the driver."""
        while not happened():
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.002)
        self.family.alive()

    def kill(self) -> None:
        """Kill the driver as `kill -9` does; its Ray processes go on."""
        self.process.kill()
        self.process.wait()

    def interrupt(self) -> None:
        """Press Ctrl-C: like a terminal, send it to the driver and its process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self, patience: float = 4) -> None:
        """End the processes that are left; workers end by themselves, agents after a minute."""
        if self.process.poll() is None:
            self.family.alive()
            self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.family.end(patience)


def descendants(root: int) -> set[tuple[int, str]]:
    """Return the descendants of a process with their start times, since ids are reused."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    known, fresh = set(), {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh}
        known |= fresh
    return {(pid, fields[19]) for pid in known if (fields := _stat(pid))}


def command_of(pid: int) -> str:
    """Return the command line of a process; empty if there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""


def kill(pid: int, how: int = signal.SIGKILL) -> None:
    """Send a signal to a process, if it exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, how)


def is_alive(pid: int, started: str) -> bool:
    """Return whether the process with this id and start time runs."""
    fields = _stat(pid)
    return bool(fields) and fields[19] == started and fields[0] != "Z"


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name; none if there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []
