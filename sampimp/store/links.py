"""Symbolic links below a local root: a link that leads out of the root is refused.

A study's folder may be copied from somebody else, so a link in it must not make this package read,
overwrite or delete files elsewhere. A link that stays below the root may be followed to read and
to write; deleting removes the link and never its target. The root itself may be a link or lie below
one, because a person chose it.

Map: `check_links`.
"""

import os

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
        False, any link.
    """
    resolved_root, place = os.path.realpath(root), root
    for part in path.strip("/").split("/"):
        place = os.path.join(place, part)
        if part != ".." and not os.path.islink(place):
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
