"""The digits are scikit-learn's, in a fixed stratified split."""

import numpy as np

from sampimp.data import load_source

DIGITS_DIGEST = "6ff8dd258582f3e6"


def test_digits_is_a_stratified_partition():
    from sklearn.datasets import load_digits

    source = load_source("digits")
    assert source.train_values.shape == (1500, 1, 8, 8)
    assert source.test_values.shape == (297, 1, 8, 8)
    assert source.full_scale == 16
    images = np.concatenate([source.train_values, source.test_values]).reshape(-1, 64)
    original = load_digits().data.astype(np.uint8)
    # The same images with the same counts: the sorted rows are equal.
    np.testing.assert_array_equal(np.sort(images.view("S64"), 0), np.sort(original.view("S64"), 0))
    train = np.bincount(source.train_labels)
    test = np.bincount(source.test_labels)
    np.testing.assert_allclose(test, (train + test) * 297 / 1797, atol=1)
    # The split never changes: results are compared across versions.
    assert source.digest.startswith(DIGITS_DIGEST)
    assert load_source("digits").digest == source.digest
