"""Run a command and exit with its code, without a traceback whenever it is interrupted.

SIGTERM ends a command as Ctrl-C does, with the exit code 143 (of a shell's 128 + 15).

After a command has returned, Ray and Python wait for threads and processes to end. Ctrl-C at that
moment would raise in whatever code runs just then, and print a traceback below the output of the
command. So a process ignores Ctrl-C once its exit code is known, and ignores a second Ctrl-C
shortly after the first.

Map: `run_door`, `INTERRUPTED`, `TERMINATED`.
"""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from sampimp.errors import DamageWarning, printable

INTERRUPTED = "Interrupted. Committed trials are kept; the same command continues."
"""Message of an interrupted command."""

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a command that SIGTERM ended."""

GRACE = 20.0
"""Seconds after SIGTERM in which a command ends; then its process does. A service manager signals
the processes of Ray as well, and Ray's client waits a minute for a server that is gone."""

PAUSE = 5.0
"""Seconds after Ctrl-C in which another one is ignored: a study ends within two (arbitrary)."""


def run_door(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command with the arguments of this process; end the process with its exit code.

    Parameters
    ----------
    main
        From arguments to the exit code; it handles KeyboardInterrupt itself.
    """
    warnings.showwarning = partial(_show_warning, warnings.showwarning)
    interrupt = _Interrupt()
    # A process that was started in the background ignores Ctrl-C, and continues to.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            sys.unraisablehook = _hide_late_interrupt
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except BrokenPipeError:  # the reader of a pipe has ended, as in `sampimp study --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:  # outside of the part of `main` that handles it
        print(INTERRUPTED, file=sys.stderr)
        code = 130
    sys.exit(TERMINATED if code == 130 and interrupt.by_sigterm else code)


def _show_warning(
    show_other: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    *place: Any,
    **options: Any,
) -> None:
    """Show what is damaged in one line, without the line of code that found it."""
    if issubclass(category, DamageWarning):
        print(printable(str(message)), file=sys.stderr)
    else:
        show_other(message, category, *place, **options)


def _hide_late_interrupt(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hide the error of a Ctrl-C that arrived between two instructions of `signal.signal`.

    Python reports such a signal as an OSError that it cannot raise.
    """
    if "ignored due to race condition" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


class _Interrupt:
    """Raises KeyboardInterrupt at a signal, unless it did so less than `PAUSE` seconds ago.

    A later Ctrl-C counts again: code that cannot propagate an exception, such as a destructor, may
    have swallowed the first.
    """

    def __init__(self) -> None:
        self._last = -PAUSE
        self.by_sigterm = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last >= PAUSE:
            self._last, self.by_sigterm = now, number == signal.SIGTERM
            if self.by_sigterm:
                end = threading.Timer(GRACE, os._exit, (TERMINATED,))
                end.daemon = True
                end.start()
            raise KeyboardInterrupt
