"""One variable of a stored record, each chunk compared with its digest when it is read.

Map: `StoredVariable`, `StoredFiles` (a variable of files); `stored_variable`, which returns the
right one; `check_history` (whether a commit fits its record's shape), `holds_steps` (whether a
checkpoint's history ends at its step); `read_difficulty` (the values that the sorted strategies
sort by).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sampimp.errors import RecordError, StoreError
from sampimp.schema import COMMITTED, Layout, RecordLayout, digest, variable
from sampimp.store.array_forms import ArrayForm
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
        """Return a variable of a record from its COMMIT.json or a checkpoint's history.

        Raises
        ------
        RecordError
            It has more positions or chunks than the layout.
        """
        parts = tuple((first, record) for first, record in history["parts"])
        digests = history["digests"].get(name, ())
        _check_digests(digests, name, layout, str(trial))
        return cls(trial, name, layout, parts, digests)

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
            form = ArrayForm(
                self.layout.shape(self.name),
                variable(self.name).dtype,
                self.layout.chunk(self.name),
            )
            array = open_array(self.trial.root, f"{prefix}{record}/{self.name}", form)
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


def check_history(
    history: Mapping[str, Any], layout: RecordLayout, where: str, *, complete: bool = False
) -> None:
    """Raise RecordError unless a record's history fits the shape of the record.

    Parameters
    ----------
    history
        Its COMMIT.json, or the history of a checkpoint, with the entries of their file types.
    layout
        The shape of the record.
    where
        The record, for the message.
    complete
        Whether every step has to be there.
    """
    known, curves = set(layout.variables), history["curves"]
    for name in (*history["digests"], *curves):
        _require(name in known, where, f"a variable among {', '.join(layout.variables)}", name)
    starts = [first for first, _ in history["parts"]]
    ordered = starts[:1] == [0] and starts == sorted(starts)
    _require(ordered, where, "parts of the record from step 0 on", f"parts from {starts[:3]}")
    for name, digests in history["digests"].items():
        _check_digests(digests, name, layout, where)
    for name in known if complete else ():
        if variable(name).dtype == "bool":  # which has no value that says that it is missing
            count = len(list(filter(None, history["digests"].get(name, ()))))
            positions = len(layout.positions(name))
            _require(count == positions, where, f"digests of {positions} {name}", str(count))
    for name in known.intersection(COMMITTED if complete else curves):
        shape, values = layout.shape(name), curves.get(name, [])
        count = len(values)
        fits = count == shape[0] if complete else count <= shape[0]
        _require(fits, where, f"{shape[0]} values of {name}", str(count))
        rows = {(len(row),) if isinstance(row, list) else () for row in values}
        _require(rows <= {shape[1:]}, where, f"values of {name} of shape {shape[1:]}", str(rows))


def holds_steps(history: Mapping[str, Any], layout: RecordLayout, step: int) -> bool:
    """Return whether a checkpoint's history has what the steps up to one write, and no more.

    What later steps write is appended to it, and is found by its place.
    """
    for name in layout.variables:
        stored = history["curves" if name in COMMITTED else "digests"].get(name, ())
        if len(stored) != sum(each <= step for each in layout.positions(name)):
            return False
    return len(history["seconds"]) == step


def _check_digests(
    digests: Sequence[Sequence[str]], name: str, layout: RecordLayout, where: str
) -> None:
    positions = len(layout.positions(name))
    most = f"at most {positions} steps with digests of {name}"
    _require(len(digests) <= positions, where, most, str(len(digests)))
    chunks = 1
    if variable(name).dtype != "bytes":
        chunks = -(-layout.shape(name)[-1] // layout.chunk(name)[-1])
    counts = {len(each) for each in digests}
    words = f"{chunks} chunks of {name} in each step"
    _require(counts <= {0, chunks}, where, words, " or ".join(map(str, sorted(counts))))


def _require(holds: bool, where: str, expected: str, got: str) -> None:
    if not holds:
        raise RecordError(
            expected=expected,
            got=got[:80],
            where=where,
            todo="restore this record from a copy, or delete its folder and run the command that "
            "wrote it again",
        )


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
