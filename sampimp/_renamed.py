"""Old import paths, for one release: each still works, and a DeprecationWarning names the new one.

`moved` serves the names of a module that was split or renamed; `alias_package` serves the folders
`sweeps/` and `analysis/` of a checkout, whose packages are `sampimp.sweeps` and `sampimp.analysis`.
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


def moved(old: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose names have moved.

    Parameters
    ----------
    old
        The old module, its `__name__`.
    homes
        The new module of each name.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        warnings.warn(
            f"{old}.{name} is now {homes[name]}.{name}; the old path will be removed in the next "
            "release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(homes[name]), name)

    return get


def alias_package(old: str, new: str) -> None:
    """Make `import old.module` return the module `new.module`, so that no file is loaded twice.

    Called by the package itself where it is imported as `old`, as in `python -m analysis.report`.
    """
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
    """Loads a module under its new name; `python -m` asks for its code instead."""

    def __init__(self, spec: ModuleSpec) -> None:
        self.spec = spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(
            f"{spec.name} is now {self.spec.name}; the old path will be removed in the next "
            "release",
            DeprecationWarning,
            stacklevel=2,
        )
        return import_module(self.spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # importlib has replaced it by the alias's

    def get_code(self, fullname: str) -> CodeType | None:
        assert self.spec.loader is not None
        return self.spec.loader.get_code(self.spec.name)  # type: ignore[attr-defined]
