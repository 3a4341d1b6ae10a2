"""A source is identified by every value, and refuses values unfit for training."""

import numpy as np
import pytest
from sources import tiny_source

from sampimp.errors import DataError


def test_digest_covers_every_value_but_the_name():
    digests = {
        tiny_source().digest,
        tiny_source(train_values=np.zeros((4, 3), np.float32)).digest,
        tiny_source(train_labels=np.array([1, 0, 0, 1])).digest,
        tiny_source(test_values=np.zeros((2, 3), np.float32)).digest,
        tiny_source(test_labels=np.array([0, 1])).digest,
        tiny_source(full_scale=2.0).digest,
    }
    assert len(digests) == 6
    assert tiny_source().digest == tiny_source(name="other").digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.array([0, 1, 0])}, "4 inputs and 3 labels"),
        ({"train_values": np.zeros((0, 3), np.float32)}, r"float32 \[0, 3\]"),
        ({"train_values": np.zeros((4, 0), np.float32)}, r"float32 \[4, 0\]"),
        ({"train_values": np.zeros(4, np.float32)}, r"float32 \[4\]"),
        ({"train_values": np.zeros((4, 3))}, r"float64 \[4, 3\]"),
        ({"train_labels": np.array([0.0, 1, 0, 1])}, r"float64 \[4\]"),
        ({"train_labels": np.eye(4, dtype=np.int64)}, r"int64 \[4, 4\]"),
        ({"train_labels": np.array([0, 1, 2, 5])}, r"2 at sample 2 \(2 out of range\)"),
        ({"test_labels": np.array([0, -1])}, r"-1 at sample 1 .*\n.*made, test set"),
        ({"train_labels": np.zeros(4, np.int64)}, "no training sample of 1 of its classes: b"),
        ({"test_values": np.ones((2, 4), np.float32)}, r"float32 \(4,\)"),
        ({"test_values": np.ones((2, 3), np.uint8)}, r"uint8 \(3,\)"),
    ],
)
def test_unfit_source_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        tiny_source(**changes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_error_names_the_first_value_that_is_not_finite(value):
    values = np.zeros((4, 3, 2), np.float32)
    values[2, 1, 0] = values[3, 0, 0] = value
    message = rf"{value} at sample 2, position \[1, 0\] \(2 such values\)"
    with pytest.raises(DataError, match=message):
        tiny_source(train_values=values, test_values=values[:2])
