"""The digits that come with scikit-learn: 1,797 images of 8 x 8 pixels, for tests and examples.

Map: `load_digits`.
"""

import numpy as np

from sampimp.data.source import Source
from sampimp.errors import require_package

DIGITS_TEST = 297
"""Test images of `digits`: arbitrary, so that a round 1,500 are left for training."""


def load_digits() -> Source:
    """Return the digits: 1,500 training images and 297 test images, the same in every process.

    Raises
    ------
    MissingPackageError
        scikit-learn is not installed.
    """
    require_package("sklearn.datasets", "study")
    from sklearn import datasets

    values, labels = datasets.load_digits(return_X_y=True)
    images = values.astype(np.uint8).reshape(-1, 1, 8, 8)
    # About every sixth image in the order of the classes: stratified, and without a generator.
    by_class = np.argsort(labels, kind="stable")
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class[np.arange(DIGITS_TEST) * len(labels) // DIGITS_TEST]] = True
    return Source(
        name="digits",
        train_values=images[~is_test],
        train_labels=labels[~is_test].astype(np.int64),
        test_values=images[is_test],
        test_labels=labels[is_test].astype(np.int64),
        full_scale=16.0,
        class_names=tuple(map(str, range(10))),
    )
