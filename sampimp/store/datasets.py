"""Data sets in a study's store: values before scaling and labels, with a digest of each chunk.

    OUT/datasets/mnist.zarr    train_values, train_labels, test_values, test_labels
                               train_files, test_files where the samples are files

The attributes of the group are written last, by one put: a data set without them is not complete.
A study keeps its data so that a reader needs no other source, and so that every number can be
traced to the samples it was measured on.

Map: `store_source` (once for a study), `write_source`; `chunk_table` (shapes, types and digests);
`open_source` and `StoredSource` (a reader that verifies each chunk); `read_source` (all of it, in
memory).
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sampimp.data import Source
from sampimp.data.npz import machine_memory
from sampimp.errors import RecordError, ResourceError, StoreError
from sampimp.schema import digest, digest_json
from sampimp.store.array_forms import ArrayForm
from sampimp.store.file_names import LONGEST_NAME, decode_names, encode_names
from sampimp.store.file_types import SourceAttrs
from sampimp.store.json_types import require_type
from sampimp.store.location import Folder
from sampimp.store.manifests import has_manifest, write_manifest
from sampimp.store.seals import json_bytes
from sampimp.store.zarr_arrays import first_line, open_uncached, write_array

SOURCE_ARRAYS = ("train_values", "train_labels", "test_values", "test_labels")
"""The arrays of a data set."""

FILE_ARRAYS = ("train_files", "test_files")
"""The arrays of file names that a data set may have, of `sampimp.store.file_names`."""

PARTS = ("train", "test")

SOURCE_CHUNK = 2**22
"""Largest chunk of these arrays in bytes, unless one sample has more (arbitrary)."""

LARGEST_SOURCE_CHUNK = 2**26
"""Largest chunk that is read, unless one sample has more (arbitrary)."""


def chunk_table(source: Source) -> dict[str, Any]:
    """Return the layout of a stored data set and each chunk's digest, as JSON values."""
    arrays = {name: _chunks_of(getattr(source, name)) for name in SOURCE_ARRAYS}
    return {"full_scale": source.full_scale, "arrays": arrays}


def _chunks_of(values: np.ndarray) -> dict[str, Any]:
    """Return the entry of an array in a table of chunks."""
    rows = max(1, min(len(values), SOURCE_CHUNK // max(1, values[0].nbytes)))
    return {
        "shape": list(values.shape),
        "dtype": values.dtype.str,
        "rows": rows,
        "digests": [digest(values[start : start + rows]) for start in range(0, len(values), rows)],
    }


def store_source(study: Folder, key: str, source: Source) -> None:
    """Store a data set of a study, with the list of its files, unless it is stored.

    Parameters
    ----------
    study
        The store of the study.
    key
        The key of the data set.
    source
        Its values.
    """
    name = f"datasets/{key}.zarr"
    if read_source(study / name) is None:
        write_manifest(study, name, write_source(study / name, source))
    elif not has_manifest(study, name):
        write_manifest(study, name)


def write_source(folder: Folder, source: Source) -> dict[str, str]:
    """Store a data set: its values before scaling, its labels, and the digest of each chunk.

    Several processes may store the same data set at once, while others read it: each writes the
    same bytes to the same keys, and deletes none of them. Another data set is replaced.

    Returns
    -------
    dict of str to str
        SHA-256 of each file, by its path.
    """
    if _attributes(folder).get("digest", source.digest) != source.digest:
        folder.remove()
    files: dict[str, str] = {}

    def note(path: str, content: Any) -> None:
        files[path] = hashlib.sha256(content).hexdigest()

    table = chunk_table(source)
    for name, stored in table["arrays"].items():
        values = getattr(source, name)
        scale = {"full_scale": source.full_scale} if name.endswith("values") else {}
        write_array(folder, name, values, (stored["rows"], *values.shape[1:]), scale, note)
    names = _encoded_names(source)
    names_table = {name: _chunks_of(rows) for name, rows in names.items()}
    for name, rows in names.items():
        write_array(folder, name, rows, (names_table[name]["rows"], rows.shape[1]), {}, note)
    folder.sync()
    # Last, and by one put: without them the data set is not complete.
    attributes: dict[str, Any] = {
        "name": source.name,
        "class_names": list(source.class_names),
        "digest": source.digest,
        "chunks": table,
    }
    if source.image_size is not None:
        attributes["image_size"] = source.image_size
    if names_table:
        attributes["files"] = names_table
    group = json_bytes({"attributes": attributes, "zarr_format": 3, "node_type": "group"})
    folder.write_bytes("zarr.json", group)
    note("zarr.json", group)
    return files


def _encoded_names(source: Source) -> dict[str, np.ndarray]:
    """Return the arrays of the file names of a data set; none if its samples are not files."""
    if source.train_files is None or source.test_files is None:
        return {}
    return dict(
        zip(FILE_ARRAYS, map(encode_names, (source.train_files, source.test_files)), strict=True)
    )


def _attributes(folder: Folder) -> dict[str, Any]:
    """Return the attributes of a data set; empty if it is not complete, or they are no JSON.

    A power cut may leave a part of the file while the data set is not complete.
    """
    try:
        attributes: dict[str, Any] = (folder.read_json("zarr.json") or {}).get("attributes", {})
    except RecordError:
        return {}
    return attributes


@dataclass(frozen=True)
class StoredSource:
    """A data set of a study, each chunk compared with its digest when it is read.

    Parameters
    ----------
    folder
        OUT/datasets/KEY.zarr.
    attrs
        The attributes of its group.
    table
        As `chunk_table`, with the arrays of file names if there are any; without "digests" if the
        data set was stored by an earlier version.
    """

    folder: Folder
    attrs: Mapping[str, Any]
    table: Mapping[str, Any]

    @property
    def has_files(self) -> bool:
        """Whether the names of the samples' files are stored."""
        return "files" in self.attrs

    @property
    def is_verifiable(self) -> bool:
        """Whether its chunks have digests."""
        return "chunks" in self.attrs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the rows of one array from `start` to `stop`; of `FILE_ARRAYS` the names, [N].

        Raises
        ------
        RecordError
            A stored chunk differs from the one that was written, or a name is not UTF-8.
        """
        shape, rows = self.table["arrays"][name]["shape"], self.table["arrays"][name]["rows"]
        stop = shape[0] if stop is None else stop
        first, last = start // rows, -(-stop // rows)
        chunks = [self._read_chunk(name, number) for number in range(first, last)]
        values = np.concatenate(chunks)[start - first * rows : stop - first * rows]
        if name not in FILE_ARRAYS:
            return values
        try:
            return decode_names(values)
        except UnicodeDecodeError as error:
            where = f"{self.folder}, {name}"
            raise _source_error("file names in UTF-8", str(error), where) from None

    def damage(self) -> Iterator[str]:
        """Yield a description of each chunk that differs from the one that was written."""
        for name, stored in self.table["arrays"].items():
            for number in range(len(stored.get("digests", ()))):
                try:
                    self._read_chunk(name, number)
                except RecordError as error:
                    yield f"{self._describe(name, number)}: {error.got}"

    def _read_chunk(self, name: str, number: int) -> np.ndarray:
        stored = self.table["arrays"][name]
        start, stop = number * stored["rows"], (number + 1) * stored["rows"]
        try:
            array = open_uncached(self.folder, name, _form(stored))
            values = np.asarray(array[start:stop])
            actual = digest(values)
        except StoreError:
            raise  # the store cannot be reached; the chunk may be intact
        except Exception as error:  # of Zarr or any codec, depending on the damage
            actual = first_line(error)
        expected = stored["digests"][number] if "digests" in stored else actual
        if actual != expected:
            raise _source_error(
                expected=f"a chunk with digest {expected[:16]}, in the data set with digest "
                f"{self.attrs['digest']}",
                got=actual[:16] if len(actual) == len(expected) else actual,
                where=f"{self.folder}, {self._describe(name, number)}",
            )
        return values

    def _describe(self, name: str, number: int) -> str:
        rows = self.table["arrays"][name]["rows"]
        last = min((number + 1) * rows, self.table["arrays"][name]["shape"][0]) - 1
        return f"{name}, rows {number * rows} to {last}"


def open_source(
    folder: Folder, expected_digest: str | None = None, expected_chunks: str = ""
) -> StoredSource | None:
    """Open a stored data set without reading its arrays.

    Parameters
    ----------
    folder
        OUT/datasets/KEY.zarr.
    expected_digest, expected_chunks
        Digests in the plan; if None or empty, the digest is not compared.

    Returns
    -------
    StoredSource or None
        None if the data set does not exist or is not complete.

    Raises
    ------
    RecordError
        The data set is not the one of the plan.
    """
    attrs = _attributes(folder)
    if "digest" not in attrs:
        return None
    require_type(attrs, SourceAttrs, f"{folder}/zarr.json, attributes")
    table = attrs.get("chunks")
    for label, actual, expected in (
        ("digest", attrs["digest"], expected_digest or attrs["digest"]),
        ("digests of its chunks", digest_json(table), expected_chunks or digest_json(table)),
    ):
        if actual != expected:
            raise _source_error(
                expected=f"the data set of the plan, {label} {expected[:16]}",
                got="none" if table is None and label != "digest" else actual[:16],
                where=f"{folder}/zarr.json",
            )
    if table is None:
        table = _table_without_digests(folder)
    files = attrs.get("files", {})
    _check_names(table["arrays"], files, folder)
    table = {**table, "arrays": table["arrays"] | files}
    _check_table(table, folder)
    return StoredSource(folder, attrs, table)


def read_source(folder: Folder) -> Source | None:
    """Read a stored data set into memory; None if it does not exist or is not complete.

    Raises
    ------
    RecordError
        Its values are not those that were stored.
    ResourceError
        It claims more bytes than this machine has memory.
    """
    stored = open_source(folder)
    if stored is None:
        return None
    size = sum(math.prod(_form(array).shape) for array in stored.table["arrays"].values())
    memory = machine_memory()
    if size > memory:  # at least one byte a value
        raise ResourceError(
            expected=f"a data set that fits into this machine's memory of {memory / 1e9:.0f} GB",
            got=f"{size:,} values",
            where=str(folder),
            todo="use a machine with more memory, or restore the data set from a copy",
        )
    values = {name: stored.read(name) for name in SOURCE_ARRAYS}
    files = [
        tuple(stored.read(name).tolist()) if stored.has_files else None for name in FILE_ARRAYS
    ]
    source = Source(
        name=stored.attrs["name"],
        train_values=values["train_values"],
        train_labels=values["train_labels"],
        test_values=values["test_values"],
        test_labels=values["test_labels"],
        full_scale=stored.table["full_scale"],
        class_names=tuple(stored.attrs["class_names"]),
        image_size=stored.attrs.get("image_size"),
        train_files=files[0],
        test_files=files[1],
    )
    if source.digest != stored.attrs["digest"]:
        raise _source_error(
            expected=f"a data set with digest {stored.attrs['digest']}",
            got=source.digest,
            where=str(folder),
        )
    return source


def _form(stored: Mapping[str, Any]) -> ArrayForm:
    """Return the form of an array of a data set from its entry in the table."""
    shape = tuple(stored["shape"])
    return ArrayForm(shape, stored["dtype"], (stored["rows"], *shape[1:]))


def _check_names(values: Mapping[str, Any], files: Mapping[str, Any], folder: Folder) -> None:
    """Raise RecordError for other arrays than those of values, or than those of file names.

    Both tables become one: a name of a value in that of the files would replace the digests that
    the plan confirms.
    """
    for expected, got in ((SOURCE_ARRAYS, values), (FILE_ARRAYS, files or FILE_ARRAYS)):
        if set(got) != set(expected):
            words = f"the arrays {', '.join(expected)}"
            raise _source_error(words, ", ".join(got)[:80], f"{folder}/zarr.json")


def _check_table(table: Mapping[str, Any], folder: Folder) -> None:
    """Raise RecordError for a table of sizes that contradict each other, or that are too large.

    With as many digests as chunks, and chunks of limited size, no few bytes can claim many.
    """
    arrays = table["arrays"]
    shapes = {name: tuple(array["shape"]) for name, array in arrays.items()}
    files = [name for name in FILE_ARRAYS if name in arrays]
    wrong = {
        "labels of other lengths than values": any(
            shapes[f"{part}_labels"] != shapes[f"{part}_values"][:1] for part in PARTS
        ),
        "training and test samples of different shape": shapes["train_values"][1:]
        != shapes["test_values"][1:],
        "a full scale that is no positive number": not 0 < table["full_scale"] < math.inf,
        "labels that are not integers": {arrays[f"{part}_labels"]["dtype"] for part in PARTS}
        != {"<i8"},
        f"file names that are not one row of at most {LONGEST_NAME} bytes for each sample": any(
            arrays[name]["dtype"] != "|u1"
            or len(shapes[name]) != 2
            or shapes[name][0] != shapes[name.replace("files", "labels")][0]
            or not 0 < shapes[name][1] <= LONGEST_NAME
            for name in files
        ),
        "another number of digests than chunks": any(
            len(stored["digests"]) != -(-stored["shape"][0] // stored["rows"])
            for stored in arrays.values()
            if "digests" in stored
        ),
        f"chunks larger than one sample and {LARGEST_SOURCE_CHUNK:,} bytes": any(
            form.chunk_bytes > LARGEST_SOURCE_CHUNK and form.chunks[0] > 1
            for form in map(_form, arrays.values())
        ),
    }
    if any(wrong.values()):
        got = ", ".join(words for words, holds in wrong.items() if holds)
        raise _source_error("arrays that fit together", got, f"{folder}/zarr.json")


def require_planned_shape(
    source: StoredSource, train: int, test: int, shape: tuple[int, ...]
) -> None:
    """Raise RecordError unless a data set has the sizes of the plan.

    Parameters
    ----------
    source
        The data set.
    train, test
        Number of samples.
    shape
        Shape of a sample.
    """
    for part, count in (("train", train), ("test", test)):
        stored = tuple(source.table["arrays"][f"{part}_values"]["shape"])
        if stored != (count, *shape):
            raise _source_error(
                expected=f"{part} values {[count, *shape]}, as in study.json",
                got=str(list(stored))[:80],
                where=f"{source.folder}/zarr.json",
            )


def _table_without_digests(folder: Folder) -> dict[str, Any]:
    """Return the chunk table of a data set that was stored without one, from its arrays."""
    try:
        arrays = {name: open_uncached(folder, name) for name in SOURCE_ARRAYS}
        return {
            "full_scale": _full_scale(arrays["train_values"].attrs["full_scale"]),
            "arrays": {
                name: {
                    "shape": list(array.shape),
                    "dtype": array.dtype.str,
                    "rows": array.chunks[0],
                }
                for name, array in arrays.items()
            },
        }
    except StoreError:
        raise
    except Exception as error:  # as in `StoredSource`
        raise _source_error(
            expected=f"the arrays {', '.join(SOURCE_ARRAYS)}",
            got=first_line(error),
            where=str(folder),
        ) from None


def _full_scale(value: Any) -> float:
    return float(value)


def _source_error(expected: str, got: str, where: str) -> RecordError:
    return RecordError(
        expected=expected,
        got=got,
        where=where,
        todo="delete this data set's folder and run the study's own command again: the data set is "
        "read from its source, and stored again",
    )
