"""Checks of a study that is stored, before something is computed from its runs.

Map: `check_model`, `require_source`.
"""

from sampimp.data import Source
from sampimp.errors import ConfigError, StoreError
from sampimp.store.datasets import read_source
from sampimp.store.location import Folder
from sampimp.store.plan import Plan


def check_model(plan: Plan, model: str | None) -> None:
    """Raise ConfigError unless the named network is the study's, and the study has its identity.

    A store may come from another person, and its `package.module:function` may be any function,
    which would be imported and called. So the user has to name the function as well.
    """
    name = plan.training.model
    if model != name and (model is not None or ":" in name):
        raise ConfigError(
            expected=f"option --model {name}",
            got="none" if model is None else f"--model {model}",
            where="study.json, which names the network",
            todo="name it if you know that function and trust it: it is imported and called",
        )
    if ":" in name and any(info.network is None for info in plan.datasets.values()):
        raise ConfigError(
            expected=f"a study that records the identity of its network {name}",
            got="a study of an earlier version, which recorded the name only",
            where="study.json",
            todo="use the in-step importance: the network cannot be shown to be the same",
        )


def require_source(folder: Folder, key: str) -> Source:
    """Return a data set of a study, or raise StoreError if it is not stored."""
    source = read_source(folder / "datasets" / f"{key}.zarr")
    if source is None:
        raise StoreError(
            expected="the study's data set",
            got="none, or one that is not complete",
            where=f"{folder}/datasets/{key}.zarr",
            todo="run `sampimp study` again with the same options, which stores it again",
        )
    return source
