"""Files of a study on a local disk: the only module that creates, replaces or deletes them.

A file is written under a temporary name and gets its own by a rename or, if it must not exist yet,
by a link: a reader sees the old content or the new one, never a part. That says nothing about a
power cut, after which a file that was not synced may be absent, empty or a part. So there are two
ways to write:

`write`
    for what a later digest covers, such as chunks: durable with the next `sync_all`.
`publish`
    for what others rely on, such as a commit: durable when the call returns. The file is synced,
    then renamed or linked, then its folder and all folders above it, the root's parent included,
    since any of them may be new.

A sync that fails raises an error. It is not repeated: the kernel forgets such a failure, so that a
second sync would succeed without the data.

Temporary names end with "#" and a number; obstore does not list such files.

Map: `write`, `publish`, `sync_all`, `delete_file`, `delete_folder`, `make_root`,
`is_temporary`.
"""

import contextlib
import ctypes
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import PurePosixPath

_MAKING_ATTEMPTS = 100
"""How often a folder is made again that another process deletes at the same time (arbitrary)."""


def write(root: str, key: str, content: bytes | memoryview) -> None:
    """Store a file whole; it is durable after the next `sync_all`.

    Parameters
    ----------
    root
        An absolute path, made if it is missing.
    key
        Path of the file, relative to the root, with slashes.
    content
        Its content.

    Raises
    ------
    OSError
        The disk refuses it.
    """
    with _temporary(root, key, content, synced=False) as temporary:
        os.replace(temporary, os.path.join(root, key))


def publish(root: str, key: str, content: bytes, *, replace: bool = True) -> None:
    """Store a file whole and durably.

    Parameters
    ----------
    root, key, content
        As for `write`.
    replace
        False stores it only if there is no such file.

    Raises
    ------
    FileExistsError
        With `replace` False: the file exists.
    OSError
        The disk refuses it, or could not make it durable.
    """
    with _temporary(root, key, content, synced=True) as temporary:
        if replace:
            os.replace(temporary, os.path.join(root, key))
        else:
            os.link(temporary, os.path.join(root, key))
    folder = PurePosixPath(key).parent
    for place in (folder, *folder.parents):
        _sync(os.path.join(root, place))
    _sync(os.path.dirname(root))


def sync_all(root: str) -> None:
    """Make everything durable that was written to the file system of the root.

    Raises
    ------
    OSError
        The disk could not.
    """
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:  # macOS
        os.sync()
        return
    folder = os.open(root, os.O_RDONLY)
    try:
        _call_syncfs(syncfs, folder)
    finally:
        os.close(folder)


def _call_syncfs(syncfs: "ctypes._NamedFuncPointer", folder: int) -> None:
    if syncfs(folder) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"syncfs: {os.strerror(error)}")


def is_temporary(name: str) -> bool:
    """Return whether a file is one that `write` or `publish` had not finished."""
    return bool(re.search(r"#\d+$", name))


def delete_file(root: str, key: str) -> None:
    """Delete a file or link.

    Raises
    ------
    FileNotFoundError
        There is none.
    OSError
        The disk refuses.
    """
    os.unlink(os.path.join(root, key))


def delete_folder(root: str, key: str) -> None:
    """Delete an empty folder.

    Raises
    ------
    OSError
        It is absent, or not empty.
    """
    os.rmdir(os.path.join(root, key))


def make_root(root: str) -> None:
    """Make a folder and the folders above it, durably, if it does not exist.

    Raises
    ------
    OSError
        A file is in the way, or the disk refuses.
    """
    if os.path.isdir(root):
        return
    above = os.path.dirname(root)
    make_root(above)
    try:
        os.mkdir(root)
    except FileExistsError:  # made meanwhile
        pass
    except FileNotFoundError as error:  # in /proc, where nothing can be made
        raise PermissionError(error.errno, "no folder can be made here", root) from None
    if not os.path.isdir(root):
        raise NotADirectoryError(f"not a folder: {root}")
    _sync(above)


@contextlib.contextmanager
def _temporary(root: str, key: str, content: bytes | memoryview, *, synced: bool) -> Iterator[str]:
    """Write a temporary file beside the place of `key`; delete it at the end if it still exists."""
    path = f"{os.path.join(root, key)}#{secrets.randbits(63)}"
    file = _create(root, str(PurePosixPath(key).parent), path)
    try:
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(file, left) :]
            if synced:
                os.fsync(file)
        finally:
            os.close(file)
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):  # it was renamed
            os.unlink(path)


def _create(root: str, folder: str, path: str) -> int:
    """Create a file and open it for writing, and make its folder if it is missing."""
    for _ in range(_MAKING_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        make_root(root)
        place = root
        for part in PurePosixPath(folder).parts:
            place = os.path.join(place, part)
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.mkdir(place)
    raise NotADirectoryError(f"no folder can be made: {os.path.join(root, folder)}")


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
