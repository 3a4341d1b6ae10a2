"""Shared by the parts of `gpu.py`: the table `Report`, the checks behind a row, and a timer."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sampimp.errors import UnsupportedError
from sampimp.schema import __version__

NEEDS_CUDA = "needs CUDA"
"""Stands for a number that only a GPU can give."""

REFUSED_ON_GPU = ("dropout between layers", "with projections")
"""Recurrent layers that can be recorded only on a CPU, where autograd's graph shows their steps."""


@dataclass
class Report:
    """A table in Markdown. Each row is printed and on the disk before the next one is measured."""

    path: Path
    title: str
    headings: tuple[str, ...]
    device: str
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Print the title, the device and the versions."""
        print(f"\n{self.title}", flush=True)
        self.note(describe(self.device))
        print(" | ".join(self.headings), flush=True)

    def row(self, *cells: str) -> None:
        """Add a row; missing cells stay empty."""
        self.rows.append((*cells, *[""] * (len(self.headings) - len(cells))))
        print(" | ".join(cells), flush=True)
        self._write()

    def note(self, text: str) -> None:
        """Add a line below the table."""
        self.notes.append(text)
        print(text, flush=True)
        self._write()

    def summarise(self, text: str) -> None:
        """Add a line that `gpu.py` repeats at its end."""
        self.notes.append(text)
        print(f"{SUMMARY}{text}", flush=True)
        self._write()

    def _write(self) -> None:
        lines = [self.headings, (":---",) * len(self.headings), *self.rows]
        table = ["| " + " | ".join(cells) + " |" for cells in lines]
        self.path.write_text("\n\n".join([f"# {self.title}", "\n".join(table), *self.notes]) + "\n")


SUMMARY = "Summary: "
"""Prefix of the lines that `gpu.py` repeats at its end."""


def describe(device: str) -> str:
    """Return the processor or card and the versions."""
    words = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    words += [f"sampimp {__version__}", f"{os.cpu_count()} CPU cores"]
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        words = [card.name, memory, f"CUDA {torch.version.cuda}", *words]
        words.append(f"cuDNN {torch.backends.cudnn.version()}")
    return "; ".join(words)


def one_line(error: BaseException) -> str:
    """Return an error, and the error at the start of its chain, as the cell of a table."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    texts = [f"{type(cause).__name__}: {cause}" for cause in dict.fromkeys((error, first))]
    words = [" ".join(text.replace("|", "/").split()) for text in texts]
    # 300 is arbitrary: CUDA's errors continue with advice.
    return "; after ".join(text if len(text) <= 300 else f"{text[:300]} ..." for text in words)


def seconds(device: str, function: Callable[[], object]) -> float:
    """Return the duration of a call in seconds: by CUDA events, on a CPU by the clock."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class PlainStepError(RuntimeError):
    """The plain step fails on this device, so that the recorded step cannot be judged."""


class Checks:
    """The checks behind one row of the table: their number, largest error and failures."""

    def __init__(self, report: Report, what: str, bound: float | None = None) -> None:
        self._report, self._what, self._bound = report, what, bound
        self._largest, self._place, self._count = 0.0, "", 0
        self._refused: list[str] = []
        self._unknown: list[str] = []
        self._failures: list[str] = []

    def check(self, name: str, error_of: Callable[[], float]) -> None:
        """Compute the error of one check, and note it, a refusal, or a failure."""
        self._count += 1
        try:
            error = error_of()
        except UnsupportedError as refusal:
            if any(words in name for words in REFUSED_ON_GPU):
                self._refused.append(name)
            else:
                self._fail(name, one_line(refusal))
        except PlainStepError as error_of_plain:
            cause = error_of_plain.__cause__ or error_of_plain
            self._unknown.append(f"{name} ({one_line(cause)})")
        except Exception as failure:  # of any kind: the other checks go on
            self._fail(name, one_line(failure))
        else:
            if error >= self._largest:
                self._largest, self._place = error, name
            if not error <= (self._bound or 0.0):
                self._fail(name, f"error {error:.1e}")

    def _fail(self, name: str, why: str) -> None:
        self._failures.append(f"{name}: {why}")
        print(f"FAILED {self._what}, {name}: {why}", flush=True)

    def close(self) -> bool:
        """Write the row and return whether everything holds."""
        bound = "" if self._bound is None else f"{self._bound:.0e}"
        largest = "" if self._bound is None else f"{self._largest:.1e} ({self._place})"
        outcome = "holds"
        if self._failures:
            outcome = f"{len(self._failures)} FAILED, first {self._failures[0]}"
        if self._refused:
            outcome += f"; {len(self._refused)} refused, as documented: {', '.join(self._refused)}"
        if self._unknown:
            outcome += f"; unknown, since the plain step fails: {', '.join(self._unknown)}"
        self._report.row(self._what, str(self._count), largest, bound, outcome)
        return not self._failures
