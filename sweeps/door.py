"""Run a command and exit with its code, without a traceback whenever Ctrl-C is pressed.

After a command has returned, Ray and Python wait for threads and processes to end. Ctrl-C at that
moment would raise in whatever code runs just then, and print a traceback below the output of the
command. So a process ignores Ctrl-C once its exit code is known, and ignores a second Ctrl-C
shortly after the first.

Map: `run_door`, `INTERRUPTED`.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

INTERRUPTED = "Interrupted. Committed trials are kept; the same command continues."
"""Message of an interrupted command."""

PAUSE = 5.0
"""Seconds after Ctrl-C in which another one is ignored: a study ends within two (arbitrary)."""


def run_door(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command with the arguments of this process; end the process with its exit code.

    Parameters
    ----------
    main
        From arguments to the exit code; it handles KeyboardInterrupt itself.
    """
    # A process that was started in the background ignores Ctrl-C, and continues to.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _Interrupt())
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            sys.unraisablehook = _hide_late_interrupt
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except BrokenPipeError:  # the reader of a pipe has ended, as in `sampimp study --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:  # outside of the part of `main` that handles it
        print(INTERRUPTED, file=sys.stderr)
        code = 130
    sys.exit(code)


def _hide_late_interrupt(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hide the error of a Ctrl-C that arrived between two instructions of `signal.signal`.

    Python reports such a signal as an OSError that it cannot raise.
    """
    if "ignored due to race condition" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


class _Interrupt:
    """Raises KeyboardInterrupt at Ctrl-C, unless it did so less than `PAUSE` seconds ago.

    A later Ctrl-C counts again: code that cannot propagate an exception, such as a destructor, may
    have swallowed the first.
    """

    def __init__(self) -> None:
        self._last = -PAUSE

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last >= PAUSE:
            self._last = now
            raise KeyboardInterrupt
