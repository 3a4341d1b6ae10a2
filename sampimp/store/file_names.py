"""File names of samples in a stored data set: one row of bytes for each sample, ended by NULs.

    OUT/datasets/photos.zarr    train_files, test_files: uint8 [N, W], in UTF-8

In this form names are arrays like the others of a data set, with a digest of each chunk. The data
set's own digest is that of its values: a file that was renamed is the same sample.

Map: `encode_names`, `decode_names`.
"""

from collections.abc import Sequence

import numpy as np

LONGEST_NAME = 1024
"""Largest W that is read; a class folder and a file of 255 bytes each, as file systems allow, have
half of it."""


def encode_names(names: Sequence[str]) -> np.ndarray:
    """Return names as uint8 [N, W]; W is the length of the longest one in UTF-8.

    Examples
    --------
    >>> encode_names(["a", "bc"])
    array([[97,  0],
           [98, 99]], dtype=uint8)
    """
    rows = np.array([name.encode() for name in names], dtype=np.bytes_)
    return rows.view(np.uint8).reshape(len(rows), -1)


def decode_names(rows: np.ndarray) -> np.ndarray:
    """Return the names [N] of uint8 [N, W], as text of at most W characters.

    Raises
    ------
    UnicodeDecodeError
        A row is not UTF-8.

    Examples
    --------
    >>> decode_names(encode_names(["a", "bc"])).tolist()
    ['a', 'bc']
    """
    width = rows.shape[1]
    texts = np.ascontiguousarray(rows).reshape(-1).view(f"S{width}")
    return np.char.decode(texts, "utf-8").astype(f"<U{width}")
