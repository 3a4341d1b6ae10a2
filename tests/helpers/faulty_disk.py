"""A disk whose n-th operation fails, as `sampimp.store` sees it.

What counts as an operation: every call of `os` in `sampimp.store.disk` that changes a disk, every
sync, every read and listing of obstore, and every listing of a folder. A sync that does not fail
does nothing, since no power is cut here.

Map: `faulty` (a context), `FaultyDisk`.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import obstore
from obstore.exceptions import GenericError, PermissionDeniedError

from sampimp.store import disk

CODES = (errno.ENOSPC, errno.EIO, errno.EACCES)
"""The errors."""

CHANGES = ("open", "write", "mkdir", "replace", "link", "unlink", "rmdir")
READS = ("get", "get_async", "get_range_async", "get_ranges_async", "head", "head_async")
LISTINGS = ("list", "list_with_delimiter", "list_with_delimiter_async")
SYNCS = ("fsync", "syncfs")


class FaultyDisk:
    """Counts operations, and lets one fail.

    Parameters
    ----------
    fails_at
        The number of that operation, from 1; 0 for none.
    code
        The error, one of `CODES`.
    """

    def __init__(self, fails_at: int = 0, code: int = errno.EIO) -> None:
        self._fails_at, self._code = fails_at, code
        self._numbers = itertools.count(1)  # its `next` is atomic
        self.count = 0
        self.failed = ""
        """The operation that failed."""

    def step(self, operation: str, path: object) -> None:
        """Count an operation; raise OSError if it is the one that fails."""
        self.count = number = next(self._numbers)
        if number == self._fails_at:
            self.failed = operation
            raise OSError(self._code, os.strerror(self._code), str(path))

    def __getattr__(self, name: str) -> Any:
        """Return what `sampimp.store.disk` uses of `os`."""
        function = getattr(os, name)
        if name not in CHANGES:
            return function

        def counted(path: Any, *arguments: Any) -> Any:
            self.step(name, path)
            return function(path, *arguments)

        return counted

    def close(self, descriptor: int) -> None:
        """Close a file, and count that: some file systems report here what they did not store."""
        os.close(descriptor)
        self.step("close", descriptor)

    def fsync(self, descriptor: int) -> None:
        """Count a sync."""
        self.step("fsync", descriptor)

    def syncfs(self, function: Any, descriptor: int) -> None:
        """Count a sync of everything."""
        self.step("syncfs", descriptor)

    def reading(self, name: str) -> Callable[..., Any]:
        """Return a function of obstore whose errors are those of obstore."""
        function = getattr(obstore, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            try:
                self.step(name, arguments[1:])
            except OSError as error:
                kind = PermissionDeniedError if error.errno == errno.EACCES else GenericError
                text = f"Generic LocalFileSystem error: {error.strerror} (os error {error.errno})"
                raise kind(text) from None
            return function(*arguments, **options)

        return counted


@contextlib.contextmanager
def faulty(monkeypatch: Any, root: object, faults: FaultyDisk) -> Iterator[None]:
    """Let an operation on the files below `root` fail inside the block."""
    scandir = os.scandir

    def counted_scandir(path: Any = ".") -> Any:
        if str(path).startswith(str(root)):
            faults.step("scandir", path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "os", faults)
        patch.setattr(disk, "_call_syncfs", faults.syncfs)
        patch.setattr(os, "scandir", counted_scandir)
        for name in READS + LISTINGS:
            patch.setattr(obstore, name, faults.reading(name))
        yield
