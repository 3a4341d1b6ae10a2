"""The end of a command: its exit code, and no traceback whenever Ctrl-C comes.

Ray, Python's threads and others have work left when a command is done: they wait for threads and
processes to end. Ctrl-C there would raise in whatever runs just then, and print a traceback over
what the command has said. So from its exit code on, a process does not listen to Ctrl-C any more;
and pressed twice, it is heard once.

Map: `run_door`.
"""

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

INTERRUPTED = "Interrupted. What is committed is kept; the same command continues."
"""What an interrupted command says."""

PAUSE = 5.0
"""Seconds after Ctrl-C in which another one is not heard: a study ends within two (arbitrary)."""


def run_door(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command with this process's arguments, and end the process with its exit code.

    Parameters
    ----------
    main
        From arguments to the exit code; it answers KeyboardInterrupt itself.
    """
    # A process that was started in the background ignores Ctrl-C, and goes on to do so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _Interrupt())
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # before `main` could answer it, or after
        print(INTERRUPTED, file=sys.stderr)
        code = 130
    sys.exit(code)


class _Interrupt:
    """Raise KeyboardInterrupt at Ctrl-C, unless another one was heard a moment ago.

    Not never again: code that cannot pass an exception on may have swallowed the first.
    """

    def __init__(self) -> None:
        self._heard = -PAUSE

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._heard >= PAUSE:
            self._heard = now
            raise KeyboardInterrupt
