"""Digests of a trial's chunks, and the search for damage.

Each chunk of a record has a SHA-256 in the trial's COMMIT.json. A damaged chunk is an error when it
is read (`sampimp.store.variables`); `find_damage` looks for all of them, and
`sampimp.store.commits.withdraw` takes the trial out of the study, which then trains it again.

Map: `chunk_digests`, `record_digest`, `find_damage`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sampimp.errors import RecordError
from sampimp.schema import RecordLayout, digest
from sampimp.store.location import Folder
from sampimp.store.variables import check_history, stored_variable


def chunk_digests(values: np.ndarray, width: int) -> list[str]:
    """Return the digest of each chunk of one epoch's values.

    Parameters
    ----------
    values
        Values of one epoch or state.
    width
        Length of a chunk along the last dimension.

    Examples
    --------
    >>> values = np.arange(6.0).reshape(2, 3)
    >>> chunk_digests(values, 2) == [digest(values[:, :2]), digest(values[:, 2:])]
    True
    """
    starts = range(0, values.shape[-1], width)
    return [digest(values[..., start : start + width]) for start in starts]


def record_digest(commit: Mapping[str, Any]) -> str:
    """Return one digest of all importance and NLL values of a committed record."""
    digests = commit["digests"]
    text = json.dumps([digests.get("importance", []), digests.get("nll", [])])
    return hashlib.sha256(text.encode()).hexdigest()


def find_damage(trial: Folder, history: Mapping[str, Any], layout: RecordLayout) -> Iterator[str]:
    """Yield a description of each chunk that differs from its digest.

    Parameters
    ----------
    trial
        OUT/trials/ID or OUT/influence/ID.
    history
        Its COMMIT.json, or the history of a checkpoint.
    layout
        The shape of its record.
    """
    try:
        check_history(history, layout, str(trial))
    except RecordError as error:
        yield error.summary
        return
    for name in history["digests"]:
        yield from stored_variable(trial, name, layout, history).damage()
