"""Names of data sets, which the user passes, and short keys, which results contain.

A name is one of `DATASETS`, or a kind and the path of the user's own data: `folder:PATH` (images)
or `npz:PATH` (arrays). A key names the data set's node in a cube and is the prefix of its trials'
names; it contains no path.

Map: `DATASETS`, `parse_name` (name to kind and path), `dataset_key` (name to key).
"""

import difflib
import os
import re
from pathlib import Path

from sampimp.errors import ConfigError

DATASETS = ("mnist", "cifar10", "digits")
"""The data sets known by name; `folder:PATH` and `npz:PATH` are the user's own."""


def parse_name(name: str) -> tuple[str, Path]:
    """Return the kind of a data set (a name of `DATASETS`, "folder" or "npz") and its path.

    The path is absolute; it is `Path()` for a name of `DATASETS`.

    Raises
    ------
    ConfigError
        The name is unknown; the message suggests the nearest one.
    """
    if name in DATASETS:
        return name, Path()
    kind, _, path = name.partition(":")
    if kind in ("folder", "npz") and path:
        return kind, Path(os.path.abspath(os.path.expanduser(path)))
    if name.endswith(".npz"):
        nearest = f"npz:{name}"
    elif Path(name).is_dir():
        nearest = f"folder:{name}"
    else:
        known = [*DATASETS, "folder:PATH", "npz:PATH"]
        nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
    raise ConfigError(
        expected=f"a data set: {', '.join(DATASETS)}, folder:PATH or npz:PATH",
        got=repr(name),
        where="the name of the data set",
        todo=f"did you mean {nearest!r}?",
    )


def dataset_key(name: str) -> str:
    """Return the short name of a data set, for nodes of the cube and identifiers of trials.

    Parameters
    ----------
    name
        One of `DATASETS`, `folder:PATH` or `npz:PATH`.

    Raises
    ------
    ConfigError
        The name is unknown; the message suggests the nearest one.

    Examples
    --------
    >>> dataset_key("mnist"), dataset_key("folder:/x/cifar10"), dataset_key("npz:/x/my data.npz")
    ('mnist', 'folder-cifar10', 'npz-my_data')
    """
    kind, path = parse_name(name)
    if kind in DATASETS:
        return kind
    stem = path.stem if kind == "npz" else path.name
    return f"{kind}-{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)}"
