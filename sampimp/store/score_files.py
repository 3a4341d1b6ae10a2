"""Scores of samples that a rule of subsets reads, in OUT/influence/scores-DIGEST.f64.

The name states the digest of the values, which are the bytes of the file.

Map: `write_scores`, `read_scores`, `has_scores`, `damaged_scores`.
"""

from collections.abc import Iterator

import numpy as np

from sampimp.errors import RecordError
from sampimp.schema import digest
from sampimp.store.influence_layouts import INFLUENCE_FOLDER
from sampimp.store.location import Folder

_START, _END = "scores-", ".f64"


def write_scores(study: Folder, scores: np.ndarray) -> str:
    """Store scores of the samples, (N,) float64, with the study; return their digest."""
    name = digest(scores)
    content = scores.astype("<f8").tobytes()
    (study / INFLUENCE_FOLDER).write_bytes(f"{_START}{name}{_END}", content)
    return name


def read_scores(study: Folder, name: str) -> np.ndarray:
    """Return stored scores, (N,) float64, by their digest.

    Raises
    ------
    RecordError
        They are missing, or others.
    """
    path = f"{_START}{name}{_END}"
    content = (study / INFLUENCE_FOLDER).read_bytes(path)
    if content is not None and len(content) % 8 == 0:
        scores = np.frombuffer(content, "<f8")
        if digest(scores) == name:
            return scores
    raise RecordError(
        expected=f"scores with digest {name[:16]}",
        got="no file" if content is None else "other values",
        where=f"{study}/{INFLUENCE_FOLDER}/{path}",
        todo="delete it, and run the same `sampimp subset` again, which stores it",
    )


def has_scores(study: Folder) -> bool:
    """Return whether scores are stored."""
    return any(path.startswith(_START) for path in (study / INFLUENCE_FOLDER).files())


def damaged_scores(study: Folder) -> Iterator[str]:
    """Yield what is wrong with the stored scores."""
    for path in (study / INFLUENCE_FOLDER).files():
        if path.startswith(_START) and path.endswith(_END):
            try:
                read_scores(study, path.removeprefix(_START).removesuffix(_END))
            except RecordError as error:
                yield f"{path}: {error.got}"
