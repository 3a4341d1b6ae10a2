"""Cost of durable commits, and the speed of verification.

Runs of a digits study are trained one after the other in this process, in pairs: once with every
sync of `sampimp.store.disk`, once without. The order within a pair alternates, and the result is
the ratio of the sums. Verification reads files of the size of MNIST's chunks, and is compared with
`sha256sum` on as many threads, in turn.

Map: `measure_syncs`, `measure_verification`, `main` (`python benchmarks/durability.py --help`).
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from study_here import command

from sampimp.data import load_source
from sampimp.store import disk
from sampimp.store.location import Folder
from sampimp.store.manifests import file_damage, read_manifest_of, write_manifest
from sampimp.sweeps.options import StudyConfig

CHUNK_BYTES = 800_000
"""Bytes of a chunk of MNIST's importance (4 layers x 50,000 samples x 4 bytes)."""


def train_seconds(out: Path, seed: int, synced: bool, epochs: int = 50) -> float:
    """Return the seconds that one run of the digits study takes."""
    config = StudyConfig(
        datasets=("digits",),
        strategies=("shuffle",),
        reference_seeds=(seed,),
        hidden=(64, 64, 64),
        epochs=epochs,
        out=str(out),
    )
    source = load_source("digits")
    fsync = os.fsync if synced else mock.Mock()
    syncfs = disk._call_syncfs if synced else mock.Mock()
    with (
        mock.patch.object(disk.os, "fsync", fsync),
        mock.patch.object(disk, "_call_syncfs", syncfs),
    ):
        start = time.perf_counter()
        command(config, source=source)
        return time.perf_counter() - start


def measure_syncs(scratch: Path, pairs: int) -> float:
    """Return the time of a study with syncs, divided by that without."""
    seconds = {True: 0.0, False: 0.0}
    for pair in range(-1, pairs):  # the first warms up
        for synced in (True, False) if pair % 2 else (False, True):
            took = train_seconds(scratch / f"{pair}-{synced}", pair + 2, synced)
            seconds[synced] += took if pair >= 0 else 0.0
    return seconds[True] / seconds[False]


def measure_verification(scratch: Path, files: int, workers: int) -> float:
    """Return the time of verification divided by that of `sha256sum`, the median of five rounds."""
    study = Folder.of(scratch)
    for number in range(files):
        study.write_bytes(f"part/{number}", os.urandom(CHUNK_BYTES), durable=False)
    write_manifest(study, "part")
    listed = read_manifest_of(study, "part")
    assert listed is not None
    names = "\n".join(str(scratch / "part" / name) for name in listed.files)
    sums = ["xargs", "-P", str(workers), "-n", "50", "sha256sum"]
    ratios = []
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(5):
            start = time.perf_counter()
            assert not any(pool.map(partial(file_damage, listed), listed.files))
            ours = time.perf_counter() - start
            start = time.perf_counter()
            subprocess.run(sums, input=names, text=True, check=True, stdout=subprocess.DEVNULL)
            ratios.append(ours / (time.perf_counter() - start))
    return statistics.median(ratios)


def main(pairs: int = 10, files: int = 1000, workers: int = 2) -> None:
    """Print both ratios.

    Parameters
    ----------
    pairs
        Runs of the digits study, each once with syncs and once without.
    files
        Files that are verified, of 0.8 MB.
    workers
        Threads that verify.
    """
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        syncs = measure_syncs(Path(scratch).resolve() / "studies", pairs)
        print(f"a digits run with syncs: {syncs:.3f} times the run without")
        ratio = measure_verification(Path(scratch).resolve() / "files", files, workers)
        print(f"verification of {files} files: {ratio:.2f} times sha256sum, {workers} threads each")


if __name__ == "__main__":
    tyro.cli(main)
