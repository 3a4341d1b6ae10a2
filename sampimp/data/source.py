"""A data set as it is stored, before scaling.

Inputs stay in their stored type (a pixel takes one byte instead of four), and one digest over all
values identifies the data set in fingerprints and in the store. A `Source` is checked when it is
made, so that every other module can rely on shapes, types and label ranges.

Map: `Source`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sampimp.errors import DataError
from sampimp.schema import digest


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """A data set as stored, before scaling; checked on construction.

    Attributes
    ----------
    name
        As in `sampimp.data.load_source`.
    train_values, test_values
        uint8 or float32, [N, ...]; images are [N, C, H, W].
    train_labels, test_labels
        int64 [N], each in 0..classes-1.
    full_scale
        The stored value that "unit" scaling maps to 1: 255 for 8-bit images, 16 for `digits`, 1 for
        float inputs.
    class_names
        The name of each label.
    image_size
        Height and width to which images were resized; None if they were not. The digest has the
        resized values.
    notes
        Sentences that a user should read: what was left out, which classes have no sample.
    train_files, test_files
        Path of each sample's file in the data set's folder, [N]; None if samples are not files.
        They are not in the digest: a file that was renamed is the same sample.

    Raises
    ------
    DataError
        Lengths or shapes differ, a set is empty, an input is NaN or infinite, a label is not an
        integer or out of range, or a class of the test set has no training sample.
    """

    name: str
    train_values: np.ndarray
    train_labels: np.ndarray
    test_values: np.ndarray
    test_labels: np.ndarray
    full_scale: float
    class_names: tuple[str, ...]
    image_size: int | None = None
    notes: tuple[str, ...] = ()
    train_files: tuple[str, ...] | None = None
    test_files: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_part(self.name, "train", self.train_values, self.train_labels, len(self.class_names))
        _check_part(self.name, "test", self.test_values, self.test_labels, len(self.class_names))
        train, test = self.train_values, self.test_values
        if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
            raise DataError(
                expected="test inputs of the shape and type of the training inputs, "
                f"{train.dtype} {train.shape[1:]}",
                got=f"{test.dtype} {test.shape[1:]}",
                where=f"data set {self.name}",
                todo="prepare both parts in the same way",
            )
        untrained = np.setdiff1d(self.test_labels, self.train_labels)
        if untrained.size:
            names = ", ".join(self.class_names[label] for label in untrained[:5])
            raise DataError(
                expected="a training sample of every class of the test set",
                got=f"no training sample of {untrained.size} of its classes: {names}",
                where=f"data set {self.name}",
                todo="add training samples of these classes, or remove them from the test set",
            )

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the four arrays and of `full_scale`."""
        return digest(
            self.train_values,
            self.train_labels,
            self.test_values,
            self.test_labels,
            np.array([self.full_scale]),
        )


def _check_part(name: str, part: str, values: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """Raise DataError unless a network can be trained on the inputs and labels of one part."""

    def error(expected: str, got: str, todo: str) -> DataError:
        return DataError(expected, got, f"data set {name}, {part} set", todo)

    if values.dtype not in (np.uint8, np.float32) or values.ndim < 2 or not values[:1].size:
        raise error(
            expected="uint8 or float32 inputs [N, ...] of at least one sample and one feature",
            got=f"{values.dtype} {list(values.shape)}",
            todo="save one row per sample, and numbers other than uint8 as float32",
        )
    if labels.dtype != np.int64 or labels.ndim != 1:
        raise error(
            expected="one label for each sample [N], integers in both parts or texts in both",
            got=f"{labels.dtype} {list(labels.shape)}",
            todo="save one integer per sample as int64: labels.argmax(1) of one-hot vectors, "
            "labels[:, 0] of one column",
        )
    if len(values) != len(labels):
        raise error(
            expected="one label for each input",
            got=f"{len(values):,} inputs and {len(labels):,} labels",
            todo="save inputs and labels of the same samples",
        )
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        raise error(
            expected=f"labels in 0..{classes - 1}",
            got=f"{labels[outside[0]]} at sample {outside[0]} ({outside.size:,} out of range)",
            todo="number the classes from 0",
        )
    bad = np.zeros(1, bool) if values.dtype == np.uint8 else ~np.isfinite(values)
    if bad.any():
        first = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        raise error(
            expected="finite inputs, within the range of float32",
            got=f"{values[first]} at sample {first[0]}, position {list(first[1:])} "
            f"({np.count_nonzero(bad):,} such values)",
            todo="correct or remove these samples",
        )
