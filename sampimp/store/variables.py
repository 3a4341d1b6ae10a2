"""One variable of a stored record, each chunk compared with its digest when it is read.

Map: `StoredVariable`, `StoredFiles` (a variable of files); `stored_variable`, which returns the
right one; `read_difficulty` (the values that the sorted strategies sort by).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sampimp.errors import RecordError, StoreError
from sampimp.schema import Layout, RecordLayout, digest, variable
from sampimp.store.commits import require_commit
from sampimp.store.location import Folder
from sampimp.store.zarr_arrays import first_line, open_array


@dataclass(frozen=True)
class StoredVariable:
    """One variable of a record, each chunk compared with its digest when it is read.

    Parameters
    ----------
    trial
        OUT/trials/ID or OUT/influence/ID.
    name
        Name of the variable.
    layout
        The shape of the record.
    parts
        As `sampimp.store.record.History.parts`.
    digests
        Digest of each chunk at each position along the first dimension, in the order in which they
        were written. Positions without digests are NaN.
    """

    trial: Folder
    name: str
    layout: RecordLayout
    parts: tuple[tuple[int, str], ...]
    digests: Sequence[Sequence[str]]

    @classmethod
    def of(
        cls, trial: Folder, name: str, layout: RecordLayout, history: Mapping[str, Any]
    ) -> "StoredVariable":
        """Return a variable of a record from its COMMIT.json or a checkpoint's history."""
        parts = tuple((first, record) for first, record in history["parts"])
        return cls(trial, name, layout, parts, history["digests"].get(name, ()))

    def read(self, position: int, columns: slice = slice(None)) -> np.ndarray:
        """Return the values at one position, and in a range of columns of the last dimension.

        Raises
        ------
        RecordError
            A stored chunk differs from the one that was written.
        """
        shape, width = self.layout.shape(self.name), self.layout.chunk(self.name)[-1]
        start, stop, _ = columns.indices(shape[-1])
        rank = self.layout.order(self.name).index(position)
        unmeasured = rank >= len(self.digests) or not self.digests[rank]
        if unmeasured or stop <= start:
            leading = shape[1:-1] if self.layout.is_stepwise(self.name) else shape[:-1]
            filler = (*leading, max(0, stop - start))
            return np.full(filler, np.nan, variable(self.name).dtype)
        first, last = start // width, -(-stop // width)
        chunks = [self._read_chunk(rank, number, width) for number in range(first, last)]
        whole = chunks[0] if len(chunks) == 1 else np.concatenate(chunks, axis=-1)
        return whole[..., start - first * width : stop - first * width]

    @property
    def content(self) -> Any:
        """Path, parts and digests, which determine the values."""
        return [str(self.trial), self.parts, self.digests]

    def damage(self) -> Iterator[str]:
        """Yield a description of each chunk that differs from the one that was written."""
        width = self.layout.chunk(self.name)[-1]
        for rank, digests in enumerate(self.digests):
            for number in range(len(digests)):
                try:
                    self._read_chunk(rank, number, width)
                except RecordError as error:
                    position = self.layout.order(self.name)[rank]
                    yield f"{self.layout.describe(self.name, position)}: {error.got}"

    def _read_chunk(self, rank: int, number: int, width: int) -> np.ndarray:
        """Read one chunk of the position that was written after `rank` others."""
        position = self.layout.order(self.name)[rank]
        record = part_of(self.parts, self.layout.positions(self.name)[position])
        prefix = f"{self.trial.path}/" if self.trial.path else ""
        expected = self.digests[rank][number]
        index = (position,) if self.layout.is_stepwise(self.name) else ()
        try:
            array = open_array(self.trial.root, f"{prefix}{record}/{self.name}")
            values = np.asarray(array[(*index, ..., slice(number * width, (number + 1) * width))])
            actual = digest(values)
        except StoreError:
            raise  # the store cannot be reached; the chunk may be intact
        except Exception as error:  # of Zarr or any codec, depending on the damage
            actual = first_line(error)
        if actual != expected:
            raise RecordError(
                expected=f"a chunk with digest {expected[:16]}",
                got=actual if len(actual) != len(expected) else actual[:16],
                where=f"{self.trial}/{record}, {self.layout.describe(self.name, position)}",
                todo=f"run sweeps/status.py OUT --withdraw, {_REPAIR}",
            )
        return values


_REPAIR = "which takes damaged records out of the study, and then the command that wrote them again"


@dataclass(frozen=True)
class StoredFiles:
    """A variable of files, one written by each step; each compared with its digest when read.

    Parameters
    ----------
    folder
        OUT/influence/ID.
    name, layout, parts
        As for `StoredVariable`.
    digests
        SHA-256 of the file of each step.
    """

    folder: Folder
    name: str
    layout: RecordLayout
    parts: tuple[tuple[int, str], ...]
    digests: Sequence[Sequence[str]]

    def read(self, position: int) -> bytes:
        """Return the file at a position, which one step wrote.

        Raises
        ------
        RecordError
            It differs from the one that was written.
        """
        step, (expected,) = self.layout.positions(self.name)[position], self.digests[position]
        path = file_path(part_of(self.parts, step), self.name, step)
        content = self.folder.read_bytes(path)
        if content is None or hashlib.sha256(content).hexdigest() != expected:
            raise RecordError(
                expected=f"a file with digest {expected[:16]}",
                got="no file" if content is None else f"another one, of {len(content):,} bytes",
                where=f"{self.folder}/{path}",
                todo=f"run sweeps/status.py OUT --withdraw, {_REPAIR}",
            )
        return content

    def damage(self) -> Iterator[str]:
        """Yield a description of each file that differs from the one that was written."""
        for position in range(len(self.digests)):
            try:
                self.read(position)
            except RecordError as error:
                yield f"{self.layout.describe(self.name, position)}: {error.got}"


def stored_variable(
    folder: Folder, name: str, layout: RecordLayout, history: Mapping[str, Any]
) -> StoredVariable | StoredFiles:
    """Return a variable of a record from its COMMIT.json or a checkpoint's history."""
    array = StoredVariable.of(folder, name, layout, history)
    if variable(name).dtype != "bytes":
        return array
    return StoredFiles(folder, name, layout, array.parts, array.digests)


def part_of(parts: Sequence[tuple[int, str]], step: int) -> str:
    """Return the folder of the attempt that wrote a step; `parts` is as in `History`."""
    return next(name for first, name in reversed(parts) if first <= step)


def file_path(part: str, name: str, step: int) -> str:
    """Return where an attempt writes the file of a step, relative to the record's folder."""
    return f"{part}/{name}/{step:06d}.pt"


def read_difficulty(trial: Folder, kind: str, layout: Layout) -> np.ndarray:
    """Return the values that the sorted strategies sort by, shape (sample,), float64.

    Parameters
    ----------
    trial
        OUT/trials/ID of a committed reference run.
    kind
        "final_nll", the NLL at the end of the last epoch in nats, or "overall_importance", tau: the
        sum of importance over layers and epochs, in parameter squared (paper, sections 2 and 3.6).
    layout
        The shape of its record.
    """
    commit = require_commit(trial)
    if kind == "final_nll":
        nll = StoredVariable.of(trial, "nll", layout, commit)
        return nll.read(layout.epoch - 1).astype(np.float64)
    importance = StoredVariable.of(trial, "importance", layout, commit)
    tau = np.zeros(layout.sample)
    for position in range(layout.epoch):
        tau += importance.read(position).sum(axis=0, dtype=np.float64)
    return tau
