"""A user's own arrays, in one .npz file.

The file is untrusted input: a truncated archive, a wrong checksum, pickled objects or labels that
are not class numbers each raise an error that names the file and what is wrong with it.

Map: `load_npz`.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from sampimp.data.source import Source
from sampimp.errors import DataError


def load_npz(name: str, path: Path) -> Source:
    """Return the source of the arrays train_inputs, train_labels, test_inputs and test_labels.

    Parameters
    ----------
    name
        As in `sampimp.data.load_source`.
    path
        The .npz file. Floating-point inputs of any precision become float32, integer labels int64.

    Raises
    ------
    DataError
        The file is missing or damaged, lacks an array, or has values unfit for training.
    """
    if not path.is_file():
        raise _npz_error(path, "no such file")
    size = f"{path.stat().st_size:,} bytes"
    if not zipfile.is_zipfile(path):
        raise _npz_error(path, f"a file of {size} that is not an .npz archive, or is truncated")
    keys = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    try:
        with np.load(path, allow_pickle=False) as file:
            if any(key not in file for key in keys):
                raise _npz_error(path, f"the arrays {', '.join(file) or '(none)'}")
            train, train_labels, test, test_labels = (file[key] for key in keys)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise _npz_error(path, f"{size} that NumPy cannot read: {error}") from None
    train, test = _as_values(train), _as_values(test)
    train_labels, test_labels = _as_labels(train_labels), _as_labels(test_labels)
    largest = [int(labels.max()) for labels in (train_labels, test_labels) if _countable(labels)]
    # At most as many classes as training samples, so that a label of 10^12 makes no 10^12 names.
    classes = max(1, min(max(largest, default=0) + 1, train_labels.size))
    return Source(
        name=name,
        train_values=train,
        train_labels=train_labels,
        test_values=test,
        test_labels=test_labels,
        full_scale=255.0 if train.dtype == np.uint8 else 1.0,
        class_names=tuple(str(label) for label in range(classes)),
    )


def _npz_error(path: Path, got: str) -> DataError:
    return DataError(
        expected="an .npz file with train_inputs, train_labels, test_inputs and test_labels",
        got=got,
        where=str(path),
        todo="write it with np.savez(PATH, train_inputs=..., train_labels=..., ...)",
    )


def _as_values(inputs: np.ndarray) -> np.ndarray:
    """Return floats as float32 and other types unchanged, in C order."""
    if np.issubdtype(inputs.dtype, np.floating):
        # Values beyond float32 become infinite; `Source` reports the index of the first.
        with np.errstate(over="ignore"):
            inputs = inputs.astype(np.float32)
    return np.asarray(inputs, order="C")


def _as_labels(labels: np.ndarray) -> np.ndarray:
    """Return integers as int64 and other types unchanged."""
    return labels.astype(np.int64) if np.issubdtype(labels.dtype, np.integer) else labels


def _countable(labels: np.ndarray) -> bool:
    return labels.dtype == np.int64 and labels.size > 0
