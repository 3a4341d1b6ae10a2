"""The form of a stored array, compared with the one expected before anything is allocated.

zarr.json of somebody else's store may claim any shape, type and codec, and a chunk of a kilobyte
may claim to decode to a terabyte. So the metadata are compared with the record's layout, or with
the table of a data set, before Zarr has them. The size in a compressed chunk's header is compared
with that of a chunk before it is decoded. Sizes of the plan and of the table are limited where they
are read (`sampimp.store.file_types`, `sampimp.store.datasets`).

Map: `ArrayForm`; `check_chunk`; `LARGEST_CHUNK`.
"""

import math
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np

from sampimp.errors import RecordError
from sampimp.store.json_types import require_type

LARGEST_CHUNK = 2**33
"""Largest chunk that is read, in bytes: 8 GiB are a state of 2^31 parameters."""

_ZSTD_FRAME = b"\x28\xb5\x2f\xfd"


class _Grid(TypedDict):
    chunk_shape: list[int]


class _ChunkGrid(TypedDict):
    name: Literal["regular"]
    configuration: _Grid


class _Codec(TypedDict):
    name: Literal["bytes", "zstd"]


class _ArrayFile(TypedDict):
    """zarr.json of an array that this package wrote."""

    node_type: Literal["array"]
    shape: list[int]
    data_type: Literal["bool", "uint8", "int64", "float32", "float64"]
    chunk_grid: _ChunkGrid
    codecs: list[_Codec]
    storage_transformers: NotRequired[list[Any]]


class ArrayForm(NamedTuple):
    """Shape, type and chunks of an array."""

    shape: tuple[int, ...]
    dtype: str
    """Of NumPy, such as float32."""
    chunks: tuple[int, ...]

    @property
    def chunk_bytes(self) -> int:
        """The size of a decoded chunk."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    @classmethod
    def of(cls, metadata: Any, where: str) -> "ArrayForm":
        """Return the form that an array's zarr.json claims.

        Raises
        ------
        RecordError
            It is no array of types and codecs that this package writes, or has a chunk that is too
            large.
        """
        require_type(metadata, _ArrayFile, where)
        form = cls(
            tuple(metadata["shape"]),
            metadata["data_type"],
            tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
        )
        names = [codec["name"] for codec in metadata["codecs"]]
        if names not in (["bytes"], ["bytes", "zstd"]) or metadata.get("storage_transformers"):
            raise _wrong_form("the codecs bytes and zstd", ", ".join(names) or "none", where)
        if len(form.shape) != len(form.chunks) or not 0 < form.chunk_bytes <= LARGEST_CHUNK:
            raise _wrong_form(
                f"chunks of at most {LARGEST_CHUNK:,} bytes", f"{form.chunks}"[:80], where
            )
        return form

    def check(self, metadata: Any, where: str) -> None:
        """Raise RecordError unless an array's zarr.json is of this form."""
        claimed = ArrayForm.of(metadata, where)
        if claimed != self._replace(dtype=np.dtype(self.dtype).name):
            raise _wrong_form(str(self), str(claimed)[:200], where)

    def __str__(self) -> str:
        return f"{np.dtype(self.dtype).name} {list(self.shape)} in chunks {list(self.chunks)}"


def _wrong_form(expected: str, got: str, where: str) -> RecordError:
    return RecordError(
        expected=f"an array of {expected}",
        got=got,
        where=where,
        todo="restore it from a copy, or delete it and run the command that wrote it again",
    )


def check_chunk(content: bytes, form: ArrayForm, where: str) -> None:
    """Raise RecordError if a compressed chunk would not decode to the size of a chunk.

    Parameters
    ----------
    content
        A stored chunk, compressed by zstd.
    form
        The form of its array.
    where
        The chunk, for the message.
    """
    claimed = _decoded_size(content)
    if claimed != form.chunk_bytes:
        got = "no such size" if claimed is None else f"{claimed:,} bytes"
        raise _wrong_form(f"chunks that decode to {form.chunk_bytes:,} bytes", got, where)


def _decoded_size(content: bytes) -> int | None:
    """Return the size that the header of a zstd frame claims; None if it claims none.

    The format is RFC 8878, section 3.1.1.1.
    """
    if content[:4] != _ZSTD_FRAME or len(content) < 6:
        return None
    descriptor = content[4]
    is_single = bool(descriptor & 0x20)
    start = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    length = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
    size = int.from_bytes(content[start : start + length], "little")
    if not length or len(content) < start + length:
        return None
    return size + 256 if length == 2 else size
