"""Names of a package that are imported at their first use.

`import sampimp` takes a fraction of a second and needs no torch, and a trial's worker needs neither
dask nor xarray.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from sampimp._renamed import moved


def import_on_use(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package; the latter lists its `__all__`.

    Parameters
    ----------
    package
        Its `__name__`.
    homes
        By public name: the module that defines it. Other names are looked up in the table of moved
        names (`sampimp._renamed`).
    """

    def get(name: str) -> Any:
        if name not in homes:
            return moved(package)(name)
        return getattr(import_module(homes[name]), name)

    return get, lambda: sorted(sys.modules[package].__all__)
