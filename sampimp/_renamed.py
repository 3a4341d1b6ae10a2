"""Old import paths, for one release: each works, and a DeprecationWarning names the new path.

- `sampimp.capture`, `sampimp.rules`, ...: modules that no longer exist. A finder at the end of
  `sys.meta_path` makes an empty module whose attributes come from the new places (`MOVED`).
- Names that `sampimp.training`, `sampimp.data` and `sampimp.store` had while they were modules:
  the `__getattr__` of these packages (`moved`).
- The folders `sweeps/` and `analysis/` of a checkout, whose packages are `sampimp.sweeps` and
  `sampimp.analysis`: each calls `alias_package` if it is imported as a top-level package, as in
  `python -m analysis.report`, so that no file is loaded under two names.
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import CodeType, ModuleType
from typing import Any

MOVED: Mapping[str, Mapping[str, str]] = {}
"""Of each old module, the new path of each name."""


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(
        f"{old} is now {new}; the old path will be removed in the next release",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


def moved(old: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose names have moved.

    Parameters
    ----------
    old
        Name of the module, a key of `MOVED`.
    """

    def get(name: str) -> Any:
        new = MOVED[old].get(name)
        if new is None:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        _warn(f"{old}.{name}", new, stacklevel=2)
        module, _, attribute = new.rpartition(".")
        return getattr(import_module(module), attribute)

    return get


class _MovedFinder(MetaPathFinder, Loader):
    """Finds the modules of `MOVED` that no longer exist."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # an empty module

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "Deprecated: its names have moved."
        module.__getattr__ = moved(module.__name__)  # type: ignore[method-assign]


sys.meta_path.append(_MovedFinder())


def alias_package(old: str, new: str) -> None:
    """Make `import old.module` return the module `new.module`."""
    sys.meta_path.insert(0, _AliasFinder(old, new))
    sys.modules[old] = import_module(new)


class _AliasFinder(MetaPathFinder):
    """Finds `old.module` as `new.module`."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self.old}."):
            return None
        spec = find_spec(self.new + fullname.removeprefix(self.old))
        if spec is None:
            return None
        is_package = spec.submodule_search_locations is not None
        return spec_from_loader(fullname, _AliasLoader(spec), is_package=is_package)


class _AliasLoader(Loader):
    """Returns the module of the new name; `python -m` asks for its code instead."""

    def __init__(self, spec: ModuleSpec) -> None:
        self.spec = spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        _warn(spec.name, self.spec.name, stacklevel=2)
        return import_module(self.spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # importlib put the alias's in its place

    def get_code(self, fullname: str) -> CodeType | None:
        assert self.spec.loader is not None
        return self.spec.loader.get_code(self.spec.name)  # type: ignore[attr-defined]
