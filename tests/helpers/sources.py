"""Small data sets for tests."""

import numpy as np

from sampimp.data import Source


def tiny_source(**changes) -> Source:
    """Return 4 training and 2 test samples of 3 features; `changes` replace attributes."""
    values = {
        "name": "made",
        "train_values": np.arange(12, dtype=np.float32).reshape(4, 3),
        "train_labels": np.array([0, 1, 0, 1]),
        "test_values": np.ones((2, 3), dtype=np.float32),
        "test_labels": np.array([1, 0]),
        "full_scale": 1.0,
        "class_names": ("a", "b"),
    }
    return Source(**(values | changes))
