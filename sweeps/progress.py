"""The display while a study runs: counts, running trials, failures and the time left.

On a terminal it is a live display of a few lines; elsewhere, a line now and then.

Map: `Progress`, a callback of Ray Tune.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.tune import Callback
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sampimp.errors import UserError
from sampimp.sweeps.quantities import format_clock, format_count
from sampimp.sweeps.work import Unit

LINE_EVERY = 30.0
"""Seconds between two lines if the output is no terminal (arbitrary; a log stays short)."""

SETTLED = 10.0
"""Seconds in which a time that was measured before is shown: the first steps wait for the start of
the workers, of some seconds (arbitrary)."""


class Progress(Callback):
    """Displays the progress of a study, from the callbacks of Ray Tune.

    Parameters
    ----------
    units
        All units of work, as the store has them.
    given_up
        Labels of the units that are not tried again; the searcher adds to them.
    committed
        Labels of the units that other drivers have committed, with their state; the searcher adds
        to them.
    console
        Where the display is printed.
    words
        What the units and their steps are called, in the plural.
    seconds
        The time left before the first step is done, if it was measured.
    watch
        Called with this display whenever Ray Tune has done something.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        given_up: Collection[str],
        committed: Mapping[str, str],
        console: Console,
        words: tuple[str, str] = ("trials", "epochs"),
        seconds: float | None = None,
        watch: Callable[["Progress"], None] = lambda progress: None,
    ) -> None:
        self._given_up, self._committed, self._console = given_up, committed, console
        self._nouns, self._expected, self._watch = words, seconds, watch
        self._state = {unit.label: unit.state for unit in units}
        self._steps = {unit.label: unit.steps for unit in units}
        self._step = {unit.label: unit.steps if unit.commit else 0 for unit in units}
        self._started_with = sum(self._step.values())
        self._start = self._last_line = time.monotonic()
        self._live: Live | None = None
        self._knows_others = False

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=2
            )
            self._live.start()
        else:
            self._console.print(self._line(), highlight=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        else:
            self._console.print(self._line(), highlight=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the terminal and the watch: Tune pickles its callbacks."""
        return {**vars(self), "_live": None, "_console": None, "_watch": None}

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Count a trial as running."""
        self._set(trial.config["label"], "running")

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Count a step, and a unit that is done."""
        label = trial.config["label"]
        self._step[label] = result["epoch"]
        if result.get("superseded"):
            self._set(label, "waiting")
            self._explain_others(label)
        elif result["done"]:
            self._step[label] = self._steps[label]
            self._set(label, "diverged" if result["diverged"] else "done")
        elif self._state[label] != "running":
            self._set(label, "running")
        self._print_now_and_then()

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """Count the units of other drivers, also while this one only waits for them."""
        for label, state in self._committed.items():
            self._step[label] = self._steps[label]
            self._set(label, state)
        self._print_now_and_then()
        self._watch(self)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Print why a trial failed, and whether it is tried again."""
        label = trial.config["label"]
        given_up = label in self._given_up
        self._set(label, "failed" if given_up else "waiting")
        fate = "failed" if given_up else "is tried again"
        self._console.print(f"[bold]{label} {fate}[/]: {escape(_reason(trial))}", highlight=False)

    def _explain_others(self, label: str) -> None:
        """Print once that another driver is at work."""
        if not self._knows_others:
            self._knows_others = True
            self._console.print(
                f"Another run of this study performs {label}. This one goes on with others, and "
                "waits for what is left.",
                highlight=False,
            )

    def _set(self, label: str, state: str) -> None:
        self._state[label] = state

    def _counts(self) -> str:
        counts = Counter(self._state.values())
        shown = ("done", "running", "waiting", "blocked", "diverged", "failed")
        words = [f"{counts[state]} {state}" for state in shown if counts[state] or state == "done"]
        return f"{format_count(len(self._state), self._nouns[0])}: {', '.join(words)}"

    def is_done(self, label: str) -> bool:
        """Return whether a unit is committed, and has not diverged."""
        return self._state[label] == "done"

    def seconds_left(self) -> float | None:
        """Return the time left; None while it is unknown."""
        elapsed = time.monotonic() - self._start
        finished = sum(self._step.values()) - self._started_with
        left = sum(self._steps.values()) - sum(self._step.values())
        expected = (self._expected or 0) - elapsed
        if expected >= 1 and (not finished or elapsed < SETTLED):
            return expected
        return elapsed / finished * left if finished else None

    def _time_left(self) -> str:
        seconds = self.seconds_left()
        return "time left: measuring" if seconds is None else f"about {format_clock(seconds)} left"

    def _line(self) -> str:
        planned = format_count(sum(self._steps.values()), self._nouns[1])
        return (
            f"{format_clock(time.monotonic() - self._start)}  {self._counts()}; "
            f"{sum(self._step.values()):,} of {planned}; "
            f"{self._time_left()}"
        )

    def _print_now_and_then(self) -> None:
        if self._live is None and time.monotonic() - self._last_line > LINE_EVERY:
            self._last_line = time.monotonic()
            self._console.print(self._line(), highlight=False)

    def _render(self) -> Group:
        planned, finished = sum(self._steps.values()), sum(self._step.values())
        head = Table.grid(padding=(0, 2))
        head.add_row(
            ProgressBar(total=planned, completed=finished, width=32),
            f"{finished:,} of {format_count(planned, self._nouns[1])}",
            format_clock(time.monotonic() - self._start),
            self._time_left(),
        )
        running = [
            f"{label} {self._step[label]}/{self._steps[label]}"
            for label, state in self._state.items()
            if state == "running"
        ]
        shown = ", ".join(running[:4]) + (f" and {len(running) - 4} more" if running[4:] else "")
        body = Table.grid()  # wraps; a Text is cut off on a console with soft_wrap
        body.add_row(Text(self._counts()))
        body.add_row(Text(f"running: {shown}", style="dim"))
        return Group(head, body)


def _reason(trial: Any) -> str:
    """Return in one line why a trial failed.

    Tune's `get_error` and `get_pickled_error` read a location to which the error is copied later.
    """
    if trial.pickled_error_file is None:
        return "its process did not start"
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    if isinstance(error, RayActorError):
        return "its process or its machine died"
    cause = getattr(error, "cause", error)
    if isinstance(cause, UserError):
        return cause.summary
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"
