"""A user's own arrays, in one .npz file.

The file is untrusted input: a truncated archive, a wrong checksum, pickled objects or labels that
are not class numbers each raise an error that names the file and what is wrong with it. The shape
in an array's header is compared with the size of the file before memory is allocated.

Map: `load_npz`; `check_headers` (whether an archive can hold what its arrays claim),
`machine_memory`.
"""

import io
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
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
        Labels that are texts or truth values are the names of their classes, in sorted order.

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
        check_headers(path, path.stat().st_size, keys)
        with np.load(path, allow_pickle=False) as file:
            if any(key not in file for key in keys):
                raise _npz_error(path, f"the arrays {', '.join(file) or '(none)'}")
            train, train_labels, test, test_labels = (file[key] for key in keys)
    except DataError:
        raise
    except _DAMAGE as error:
        raise _npz_error(
            path, f"{size} that NumPy cannot read: {error or type(error).__name__}"
        ) from None
    train, test = _as_values(train), _as_values(test)
    _require_channels_first(train, path)
    train_labels, test_labels, class_names = _as_classes(train_labels, test_labels, path)
    return Source(
        name=name,
        train_values=train,
        train_labels=train_labels,
        test_values=test,
        test_labels=test_labels,
        full_scale=255.0 if train.dtype == np.uint8 else 1.0,
        class_names=class_names,
        notes=_unused_note(train_labels, class_names),
    )


def _unused_note(labels: np.ndarray, class_names: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence on the classes without a training sample, if there are any."""
    unused = np.setdiff1d(np.arange(len(class_names)), labels).tolist()
    if not unused:
        return ()
    names = ", ".join(class_names[number] for number in unused[:3]) + ", ..." * (len(unused) > 3)
    return (
        f"{len(unused)} of {len(class_names)} classes have no training sample: {names}. Number the "
        "classes from 0 without gaps to leave them out.",
    )


_DAMAGE = (
    *(OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    # of zipfile, for encryption and unknown methods, and of NumPy, for headers
    *(RuntimeError, NotImplementedError, SyntaxError, TypeError, KeyError, OverflowError),
)
"""What zipfile and NumPy raise for a damaged or hostile archive."""

_LARGEST_RATIO = 1032
"""Of deflate, by its format: NumPy compresses by nothing else."""


def machine_memory() -> int:
    """Return the memory of this machine in bytes; 2^40 where that is unknown."""
    if not hasattr(os, "sysconf"):  # on Windows
        return 2**40
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_headers(file: Path | io.BytesIO, size: int, keys: Sequence[str] = ()) -> None:
    """Raise ValueError for arrays of objects, and for shapes that an archive cannot hold.

    Parameters
    ----------
    file
        An archive of .npy files.
    size
        Its size in bytes.
    keys
        Names of the arrays. Default: all of them.
    """
    total = 0
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if keys and member.filename.removesuffix(".npy") not in keys:
                continue
            with archive.open(member) as stream:
                reader = _HEADERS.get(np.lib.format.read_magic(stream))
                if reader is None:
                    raise ValueError(f"{member.filename} is in an unknown version of .npy")
                shape, _, dtype = reader(stream)
                header = stream.tell()
            if dtype.hasobject:
                raise ValueError(
                    f"{member.filename} has pickled objects, which are not read; save texts with "
                    "array.astype(str)"
                )
            claimed = math.prod(shape) * dtype.itemsize
            total += claimed
            if (
                any(length < 0 for length in shape)
                or header + claimed != member.file_size
                or member.file_size > _LARGEST_RATIO * (member.compress_size + 64)
                or member.compress_size > size
            ):
                raise ValueError(
                    f"{member.filename} claims {dtype} {list(shape)}, in a file of {size:,} bytes"
                )
    memory = machine_memory()
    if total > memory:
        raise ValueError(f"arrays of {total:,} bytes; this machine's memory has {memory:,}")


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""Of each version of .npy that NumPy writes for arrays of numbers, the reader of its header."""


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


_TO_CLASSES = (
    "save classes as integers (labels.astype(int)), or bin a regression's targets into classes "
    "(np.digitize(targets, np.quantile(targets, [0.25, 0.5, 0.75]))); to keep the targets, record "
    "your own training loop (sampimp.ImportanceRecorder)"
)
_TO_ONE_LABEL = (
    "save one integer or text a sample: labels.argmax(1) of one-hot vectors, labels[:, 0] of one "
    "column"
)


def _require_channels_first(images: np.ndarray, path: Path) -> None:
    """Raise DataError for images whose last dimension is that of the colours."""
    if images.ndim != 4 or images.dtype != np.uint8:
        return
    channels, width = images.shape[1], images.shape[3]
    if width in (1, 3, 4) and channels not in (1, 3, 4):
        raise DataError(
            expected="8-bit images as [N, C, H, W], colours before rows and columns",
            got=f"{list(images.shape)}, which is [N, H, W, C]",
            where=f"{path}, train_inputs",
            todo="save images.transpose(0, 3, 1, 2) for train_inputs and test_inputs; what is no "
            "image, as float32",
        )


def _as_classes(
    train: np.ndarray, test: np.ndarray, path: Path
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return the labels of both parts as int64, and the name of each class.

    What is no label of a class stays as it is: `Source` refuses it.
    """
    for part, labels in (("train", train), ("test", test)):
        if np.issubdtype(labels.dtype, np.floating):
            raise DataError(
                expected="classes as labels, integers from 0 or texts: a study trains classifiers",
                got=f"{labels.dtype} {list(labels.shape)}, {len(np.unique(labels)):,} different "
                "values",
                where=f"{path}, {part}_labels",
                todo=_TO_CLASSES if labels.ndim < 2 else _TO_ONE_LABEL,
            )
    train, test = _as_texts(train), _as_texts(test)
    if train.dtype.kind == test.dtype.kind == "U" and train.ndim == test.ndim == 1:
        names, numbers = np.unique(np.concatenate([train, test]), return_inverse=True)
        return numbers[: len(train)], numbers[len(train) :], tuple(names.tolist())
    train, test = _as_integers(train), _as_integers(test)
    largest = [int(labels.max()) for labels in (train, test) if _countable(labels)]
    # At most as many classes as training samples, so that a label of 10^12 makes no 10^12 names.
    classes = max(1, min(max(largest, default=0) + 1, train.size))
    return train, test, tuple(str(label) for label in range(classes))


def _as_texts(labels: np.ndarray) -> np.ndarray:
    """Return bytes and truth values of each sample as texts, and other labels unchanged."""
    if labels.dtype.kind == "S" and labels.ndim == 1:
        return np.char.decode(labels, "utf-8", "backslashreplace")
    return labels.astype(str) if labels.dtype.kind == "b" and labels.ndim == 1 else labels


def _as_integers(labels: np.ndarray) -> np.ndarray:
    """Return integers as int64 and other types unchanged."""
    return labels.astype(np.int64) if np.issubdtype(labels.dtype, np.integer) else labels


def _countable(labels: np.ndarray) -> bool:
    return labels.dtype == np.int64 and labels.size > 0
