"""The report of the first reference run, written while the other runs train.

A study takes hours or days, and its first reference run says much already: which samples matter,
in which layer, and when. So another process of low priority writes the report once that run is
committed. The study does not depend on it: a failure is ignored, and the process is ended before
the study's own report is written.

Map: `FirstReport`.
"""

import os
import subprocess
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

from rich.console import Console

from sampimp.store.location import Folder

if TYPE_CHECKING:
    from sampimp.sweeps.progress import Progress

LEAST_TIME_LEFT = 20.0
"""Seconds of training left below which the study's own report is near (arbitrary)."""

COMMAND = (
    sys.executable,
    "-c",
    "import os, sys; os.nice(19); from sampimp.analysis.report import write_report; "
    "write_report(sys.argv[1])",
)
"""Writes the report of the study that is its last argument."""


class FirstReport:
    """Writes a report once a reference run is committed; a context that ends its process.

    Parameters
    ----------
    folder
        The store of the study. If it has a report already, no other is written.
    references
        Labels of the runs one of which has to be committed first.
    console
        Where the path of the report is printed.
    """

    def __init__(self, folder: Folder, references: Collection[str], console: Console) -> None:
        self._folder, self._references, self._console = folder, references, console
        self._is_due = (folder / "analysis").is_empty()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "FirstReport":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def look(self, progress: "Progress") -> None:
        """Start the process if it is time, and print the path of the report that it has written."""
        if self._process is not None:
            code = self._process.poll()
            if code is not None:
                self._process = None
            if code == 0:
                page = f"{self._folder}/analysis/report.html"
                self._console.print(
                    f"Report of the first runs: {page}", markup=False, highlight=False
                )
            return
        if not self._is_due or not any(map(progress.is_done, self._references)):
            return
        seconds = progress.seconds_left()
        if seconds is not None and seconds > LEAST_TIME_LEFT:
            self._is_due = False
            self._process = subprocess.Popen(
                [*COMMAND, str(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
