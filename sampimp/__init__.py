"""Sample importance: which training samples shaped a network, in which layer, and when.

`open_cube` reads a study, `load_dataset` gives the arrays that training sees, `ImportanceRecorder`
records importance in anybody's training loop, `LightningImportance` and `HuggingFaceImportance` in
those of two trainers. ARCHITECTURE.md is the map of the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sampimp.schema import __version__

if TYPE_CHECKING:
    from sampimp.data.names import Dataset, load_dataset
    from sampimp.importance.recorder import ImportanceRecorder
    from sampimp.integrations.trainers import HuggingFaceImportance, LightningImportance
    from sampimp.store.cube import open_cube

__all__ = [
    "Dataset",
    "HuggingFaceImportance",
    "ImportanceRecorder",
    "LightningImportance",
    "__version__",
    "load_dataset",
    "open_cube",
]

_HOMES = {
    "Dataset": "sampimp.data.names",
    "HuggingFaceImportance": "sampimp.integrations.trainers",
    "ImportanceRecorder": "sampimp.importance.recorder",
    "LightningImportance": "sampimp.integrations.trainers",
    "load_dataset": "sampimp.data.names",
    "open_cube": "sampimp.store.cube",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: reading a cube needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sampimp' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
