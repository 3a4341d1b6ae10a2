"""Symbolic links and special files below a local root, which are refused.

A study's folder may be copied from somebody else, so a link in it must not make this package read,
overwrite or delete files elsewhere. A link that stays below the root may be followed to read and
to write; deleting removes the link and never its target. The root itself may be a link or lie below
one, because a person chose it. A pipe would make its reader wait without end, and a device is
another machine's: whatever is neither file nor folder is refused too.

Map: `check_links`.
"""

import os
import stat

from sampimp.errors import StoreError


def check_links(root: str, path: str, *, passable: bool = True) -> None:
    """Raise StoreError if a path below a local root leads out of it through a symbolic link.

    Parameters
    ----------
    root
        An absolute path; it may be a link itself.
    path
        Relative to the root, with slashes. Its last part is checked as well.
    passable
        Whether the path may pass through links that stay below the root.

    Raises
    ------
    StoreError
        A part of the path is a link out of the root, ``..`` out of the root or, with `passable`
        False, any link; or it is a pipe, a socket or a device.
    """
    resolved_root, place = os.path.realpath(root), root
    for part in path.strip("/").split("/"):
        place = os.path.join(place, part)
        try:
            mode = os.lstat(place).st_mode
        except (OSError, ValueError):  # absent, or no path at all: its use says so
            mode = stat.S_IFREG
        if part != ".." and not stat.S_ISLNK(mode):
            _require_file(mode, place)
            continue
        target = os.path.realpath(place)
        if not passable or os.path.commonpath([resolved_root, target]) != resolved_root:
            raise StoreError(
                expected="no symbolic link that leads out of the folder"
                if passable
                else "no symbolic link in the path of the object to be deleted",
                got=f"a link to {target}",
                where=place,
                todo="remove the link, or replace it by a copy of its target; nothing was changed",
            )
        if os.path.exists(target):
            _require_file(os.stat(target).st_mode, place)


def _require_file(mode: int, place: str) -> None:
    """Raise StoreError unless a mode is that of a file or a folder."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    raise StoreError(
        expected="a file or a folder",
        got=kinds.get(stat.S_IFMT(mode), "a device"),
        where=place,
        todo="remove it; nothing was read or changed",
    )
