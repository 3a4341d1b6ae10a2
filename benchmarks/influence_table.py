"""The rows and the pages of `influence.py`, and the pool that its jobs run in.

Map: `Row` (one check), `Score` (its number and interval), `Bench` (files, jobs and rows of one
scratch folder), `Effects` (of removals).
"""

import dataclasses
import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from influence_jobs import (
    BLOCK,
    Removals,
    Setting,
    StoredRun,
    load_run,
    named_targets,
    record_run,
    retrain_block,
    reverse_block,
)

from sampimp.influence.replay import Smoothing

EXACT = Smoothing()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One check: the least (or largest) value that was asked for, and what was measured."""

    check: str
    setting: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    asked: float = float("nan")
    at_most: bool = False
    """Whether `asked` is the largest value instead of the least."""
    ceiling: float = float("nan")
    note: str = ""
    seconds: float = float("nan")

    @property
    def verdict(self) -> str:
        """Whether the value reaches what was asked, in the table's words."""
        if np.isnan(self.asked):
            return ""
        reached = self.value <= self.asked if self.at_most else self.value >= self.asked
        return "yes" if reached else "no"

    def cells(self) -> list[str]:
        """Return the row of the table."""
        asked = "" if np.isnan(self.asked) else f"{'≤' if self.at_most else '≥'} {self.asked:g}"
        interval = "" if np.isnan(self.low) else f"{number(self.low)} to {number(self.high)}"
        return [
            self.check,
            self.setting,
            asked,
            number(self.value),
            interval,
            "" if np.isnan(self.ceiling) else number(self.ceiling),
            self.verdict,
            self.note,
            "" if np.isnan(self.seconds) else f"{self.seconds:.0f}",
        ]


HEADINGS = (
    *("check", "setting", "asked", "measured", "95 % interval", "ceiling", "reached", "note"),
    "CPU s",
)


def number(value: float) -> str:
    """Return a score with three or four decimals, or an error with its power of ten.

    Examples
    --------
    >>> number(0.98712), number(0.99964), number(3e-13), number(1.0), number(120.0)
    ('0.987', '0.9996', '3.0e-13', '1.0', '120')
    """
    if np.isnan(value):
        return ""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    if value == round(value):
        return f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}"
    if abs(value) > 1.5:
        return f"{value:.2f}"
    return f"{value:.4f}" if 0.9985 < abs(value) < 1 else f"{value:.3f}"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [headings, [":---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@dataclass(frozen=True, kw_only=True)
class Effects:
    """Actual effects of removals."""

    removed: np.ndarray
    """(R, N)."""
    nll: np.ndarray
    """On the NLL of the first test samples, (R, T, repeat)."""
    mean: np.ndarray
    """On the mean NLL of all test samples, (R, 1, repeat)."""
    change: np.ndarray
    """Squared norm of the change of each layer's parameters, (R, layer, repeat)."""

    def join(self, other: "Effects") -> "Effects":
        """Return the removals of both."""
        names = [field.name for field in dataclasses.fields(self)]
        return Effects(**{n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in names})


class NotStoredError(Exception):
    """A job has not been done, and only what is stored was asked for."""


Job = tuple[Callable[..., None], Path, tuple[Any, ...]]


class Bench:
    """The files of one scratch folder, and the processes that write them.

    Parameters
    ----------
    scratch
        The folder.
    workers
        Processes of one thread each; 0 runs the jobs in this process.
    only_stored
        Run no jobs; raise NotStoredError where one is missing.
    """

    def __init__(self, scratch: Path, workers: int, *, only_stored: bool = False) -> None:
        self.scratch, self.seconds, self._only_stored = scratch, 0.0, only_stored
        self._pool = None
        if workers:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=spawn)

    def run_jobs(self, jobs: Iterable[Job]) -> None:
        """Run the jobs whose files are missing, and wait for them."""
        missing = [job for job in jobs if not job[1].exists()]
        if missing and self._only_stored:
            raise NotStoredError
        if self._pool is None:
            for function, path, arguments in missing:
                function(path, self.scratch, *arguments)
            return
        futures = [
            self._pool.submit(function, path, self.scratch, *arguments)
            for function, path, arguments in missing
        ]
        try:
            for done, future in enumerate(futures, 1):
                future.result()
                print(f"\r  {done} of {len(futures)} jobs", end="", flush=True)
        finally:
            for future in futures:
                future.cancel()
        if futures:
            print(flush=True)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown()

    def read(self, path: Path) -> dict[str, np.ndarray]:
        """Return the arrays of a job's file; its seconds are added to `seconds`."""
        with np.load(path) as file:
            arrays = dict(file)
        self.seconds += float(arrays.pop("seconds"))
        return arrays

    # Runs, effects and influence.

    def runs(self, settings: Iterable[Setting]) -> list[StoredRun]:
        """Return recorded runs."""
        settings = list(settings)
        paths = [self.scratch / setting.key / "run.npz" for setting in settings]
        self.run_jobs(
            (record_run, path, (setting,)) for path, setting in zip(paths, settings, strict=True)
        )
        return [load_run(self.scratch, setting) for setting in settings]

    def retrain(
        self, wanted: Iterable[tuple[Setting, Removals, int]], first: int | None = None
    ) -> None:
        """Retrain without the samples of the `first` removals of each kind, from several starts."""
        wanted = list(wanted)
        self.runs(dict.fromkeys(setting for setting, _, _ in wanted))
        self.run_jobs(
            (retrain_block, path, (setting, removals, repeat, start))
            for setting, removals, repeats in wanted
            for repeat in range(repeats)
            for start, path in self._blocks(setting, removals, repeat, first)
        )

    def _blocks(
        self, setting: Setting, removals: Removals, repeat: int, first: int | None
    ) -> list[tuple[int, Path]]:
        folder, count = self.scratch / setting.key, removals.count if first is None else first
        return [
            (start, folder / f"{removals.key}-r{repeat}-{start:03}.npz")
            for start in range(0, count, BLOCK)
        ]

    def count(self, setting: Setting, removals: Removals, repeats: int) -> int:
        """Return the number of removals to score: all, or if only stored ones, those stored."""
        if not self._only_stored:
            return removals.count
        missing = [
            start
            for start, path in self._blocks(setting, removals, repeats - 1, None)
            if not path.exists()
        ]
        return min([*missing, removals.count])

    def repeats(self, setting: Setting, kinds: Iterable[Removals], wanted: int) -> int:
        """Return the number of repeats to score: the wanted ones, or if only stored ones, those."""
        complete = wanted
        for kind in kinds:
            while complete and self.count(setting, kind, complete) < kind.count:
                complete -= 1
        if not complete:
            raise NotStoredError
        return complete

    def effects(
        self, setting: Setting, removals: Removals, repeats: int, first: int | None = None
    ) -> Effects:
        """Return the effects of removals, or of the `first` of them: a multiple of `BLOCK`."""
        self.retrain([(setting, removals, repeats)], first)
        by_repeat = []
        for repeat in range(repeats):
            files = [self.read(path) for _, path in self._blocks(setting, removals, repeat, first)]
            by_repeat.append({n: np.concatenate([file[n] for file in files]) for n in files[0]})
        arrays = {name: np.stack([a[name] for a in by_repeat], -1) for name in by_repeat[0]}
        return Effects(
            removed=removals.rows(load_run(self.scratch, setting).tau)[:first],
            nll=arrays["effect"],
            mean=arrays["mean_effect"][:, None],
            change=arrays["change"],
        )

    def influence(
        self, setting: Setting, specs: tuple[str, ...], smoothing: Smoothing = EXACT
    ) -> dict[str, np.ndarray]:
        """Return the influence on targets: `total`, and that of the `last` epoch, (target, N)."""
        self.reverse([(setting, specs, smoothing)])
        paths = [path for _, path in self._reverse_blocks(setting, specs, smoothing)]
        files = [self.read(path) for path in paths]
        return {name: np.concatenate([file[name] for file in files]) for name in files[0]}

    def reverse(self, wanted: Iterable[tuple[Setting, tuple[str, ...], Smoothing]]) -> None:
        """Go backward through runs."""
        wanted = list(wanted)
        self.runs(dict.fromkeys(setting for setting, _, _ in wanted))
        self.run_jobs(
            (reverse_block, path, (setting, specs, first, smoothing))
            for setting, specs, smoothing in wanted
            for first, path in self._reverse_blocks(setting, specs, smoothing)
        )

    def _reverse_blocks(
        self, setting: Setting, specs: tuple[str, ...], smoothing: Smoothing
    ) -> list[tuple[int, Path]]:
        run = load_run(self.scratch, setting)
        name = "+".join(specs).replace(":", "")
        if smoothing != EXACT:
            name += f"-eps{smoothing.eps:g}-width{smoothing.gate_width:g}"
        return [
            (first, self.scratch / setting.key / f"influence-{name}-{first:03}.npz")
            for first in range(0, len(named_targets(run, specs)), BLOCK)
        ]


class Page:
    """The page of results: a table of rows for each section, and other tables."""

    def __init__(self, scratch: Path, path: Path, sections: dict[str, str], head: str) -> None:
        self._scratch, self._path, self._head = scratch, path, head
        self._sections = sections

    def add(self, section: str, rows: Sequence[Row], text: str = "") -> None:
        """Store a section's rows and text, and write the page of all sections so far."""
        stored = {"rows": [dataclasses.asdict(row) for row in rows], "text": text}
        (self._scratch / f"rows-{section}.json").write_text(json.dumps(stored, indent=1))
        self.write()

    def write(self) -> None:
        """Write the page."""
        parts = [self._head]
        for section, title in self._sections.items():
            path = self._scratch / f"rows-{section}.json"
            if not path.exists():
                parts.append(f"## {title}\n\nNot measured.")
                continue
            stored = json.loads(path.read_text())
            rows = [Row(**row).cells() for row in stored["rows"]]
            tables = [markdown(HEADINGS, rows)] if rows else []
            parts.append("\n\n".join([f"## {title}", *tables, *filter(None, [stored["text"]])]))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("\n\n".join(parts) + "\n")
