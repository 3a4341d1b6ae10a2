"""From stored values to the inputs of a network.

The paper does not state how it scaled its inputs; "unit" is this project's default, and the scaling
is part of every trial's configuration.

Map: `Scaling`, `Dataset`, `scale_inputs`.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np

from sampimp.data.source import Source
from sampimp.errors import ConfigError

Scaling = Literal["unit", "standard"]

_BLOCK_BYTES = 2**25
"""Memory of one block of samples: arbitrary (32 MiB), small compared with any data set."""


class Dataset(NamedTuple):
    """The arrays that training reads.

    Attributes
    ----------
    train_inputs, test_inputs
        float32 [N, ...], scaled.
    train_labels, test_labels
        int64 [N].
    """

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray


def scale_inputs(source: Source, scaling: Scaling) -> Dataset:
    """Return the inputs in float32, scaled.

    Parameters
    ----------
    source
        The stored values.
    scaling
        "unit": values / full_scale, so that pixels lie in [0, 1]. "standard": in addition, minus
        the mean and divided by the standard deviation (1 where it is 0) of the training set, per
        channel of images [N, C, H, W] and per feature of other inputs.

    Raises
    ------
    ConfigError
        The scaling is not "unit" or "standard".

    Notes
    -----
    The means are float64 sums over blocks in a fixed order, so that equal sources give equal bytes.
    The memory beyond the result is a few blocks.
    """
    if scaling not in get_args(Scaling):
        raise ConfigError(
            expected=f"a scaling of {', '.join(get_args(Scaling))}",
            got=repr(scaling),
            where=f"data set {source.name}",
            todo='choose "unit" for pixels in [0, 1]',
        )
    scale = np.float32(source.full_scale)
    train = np.divide(source.train_values, scale, dtype=np.float32)
    test = np.divide(source.test_values, scale, dtype=np.float32)
    if scaling == "standard":
        mean, deviation = _moments(train)
        for inputs in (train, test):
            np.subtract(inputs, mean, out=inputs)
            np.divide(inputs, deviation, out=inputs)
    return Dataset(train, source.train_labels, test, source.test_labels)


def _moments(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (1 where it is 0) in float32, of shape [1, ...].

    float64 sums of up to 2^29 equal float32 values are exact, so that the deviation of a constant
    feature is 0, not a rounding error that inputs would be divided by.
    """
    axes = (0, 2, 3) if inputs.ndim == 4 else (0,)
    rows = max(1, _BLOCK_BYTES // (8 * inputs[0].size))
    blocks = [inputs[start : start + rows] for start in range(0, len(inputs), rows)]
    count = inputs.size // np.sum(inputs[:1], axis=axes).size
    mean = sum(block.sum(axis=axes, dtype=np.float64, keepdims=True) for block in blocks) / count
    squares = sum(np.square(block - mean).sum(axis=axes, keepdims=True) for block in blocks)
    deviation = np.sqrt(squares / count)
    return mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)
