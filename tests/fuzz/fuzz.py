"""Change files of a small study and of data sets, and read them: only named errors.

    python tests/fuzz/fuzz.py --cases 10000         what `make fuzz` runs
    python tests/fuzz/fuzz.py --first 4711 --cases 1    one case again

Every case copies the study, changes one to three files by the case's number (`fuzz_mutations`), and
reads what was changed (`fuzz_readers`): the cube, `status --verify`, the checkpoints; and one of
what takes longer, such as a continued study, a report or an explorer; the data sets as a study
does. Sealed files are sealed again, and digests are made to fit, so that the checks behind them are
reached.

An error that is no `UserError` is a failure, as is more than `MEMORY` or `PATIENCE`, a change
beside the study or, by a reader, in it, or markup in a page. A case is printed with its number.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import fuzz_readers
from fuzz_mutations import mutate
from fuzz_study import make_study
from rich.console import Console

from sampimp.errors import UserError
from sampimp.store.zarr_arrays import open_array

MEMORY = 2**30
"""Bytes that the readers may allocate beyond those of a process that has read the study once."""

PATIENCE = 60
"""Seconds that one case may take; undisturbed it takes less than one (a loaded machine: ten)."""

MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Folder of the copies, in memory where there is one: a case copies and deletes 800 files."""


class ImpatienceError(BaseException):
    """A case takes too long. No OSError, which the store would answer."""


def give_up(number, frame):
    raise ImpatienceError(f"longer than {PATIENCE} s")


def contents(folder, but=None):
    """Return size and time of everything in a folder, without one part of it."""
    return {
        str(path): (status.st_size, status.st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if but is None or not path.is_relative_to(but)
        for status in [path.lstat()]
    }


def beside(root):
    """Return the contents of what is beside the study."""
    return contents(root, but=root / "study") | contents(root.parent / "beside")


def run_case(master, number, outcomes):
    """Perform a case; return the traceback of its failure, or None."""
    draw = random.Random(number)
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as place:
        root = Path(place) / "copy"
        shutil.copytree(master, root)
        (Path(place) / "beside").mkdir()
        part, changed = mutate(root, draw)
        os.chdir(Path(place) / "beside")
        before = beside(root)
        try:
            for read in fuzz_readers.readers(part, draw):
                failure = perform(read, root, outcomes)
                if failure is None and (now := beside(root)) != before:
                    failure = f"changed beside the study: {now.items() ^ before.items()}"
                if failure is not None:
                    return f"case {number}: {read.__name__}, {changed}\n{failure}"
        finally:
            os.chdir("/")
    return None


def perform(read, root, outcomes):
    """Let a reader read; return what is wrong with what it did, or None."""
    open_array.cache_clear()
    before = contents(root / "study") if read in fuzz_readers.READ_ONLY else None
    signal.alarm(PATIENCE)
    try:
        read(root)
        outcomes["read"] += 1
    except UserError as error:
        str(error).encode()
        outcomes[type(error).__name__] += 1
    except BaseException:
        signal.alarm(0)
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    if before is not None and contents(root / "study") != before:
        return "the reader changed the study"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, give_up)
    outcomes, failures = Counter(), 0
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as place:
        master = Path(place) / "master"
        master.mkdir()
        make_study(master)
        fuzz_readers.load_all(master)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        for number in range(options.first, options.first + options.cases):
            failure = run_case(master, number, outcomes)
            if failure is not None:
                failures += 1
                print(failure, flush=True)
            if number % 1000 == 999:
                console.print(f"{number + 1 - options.first} cases, {failures} failures")
    print(f"{options.cases} cases, {failures} failures; {dict(outcomes.most_common())}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
