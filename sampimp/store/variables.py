"""One variable of a stored trial, each chunk compared with its digest when it is read.

Map: `StoredVariable`; `read_difficulty` (the values that the sorted strategies sort by).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sampimp.errors import RecordError, StoreError
from sampimp.schema import VARIABLES, Layout, digest
from sampimp.store.location import Folder
from sampimp.store.zarr_arrays import first_line, open_array


@dataclass(frozen=True)
class StoredVariable:
    """One variable of a trial, each chunk compared with its digest when it is read.

    Parameters
    ----------
    trial
        OUT/trials/ID.
    name
        Name of the variable.
    layout
        The shape of the trial's record.
    parts
        As `sampimp.store.record.History.parts`.
    digests
        Digest of each chunk at each position along the first dimension. Positions without digests
        are NaN.
    """

    trial: Folder
    name: str
    layout: Layout
    parts: tuple[tuple[int, str], ...]
    digests: Sequence[Sequence[str]]

    @classmethod
    def of(
        cls, trial: Folder, name: str, layout: Layout, history: Mapping[str, Any]
    ) -> "StoredVariable":
        """Return a variable of a trial from its COMMIT.json or a checkpoint's history."""
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
        unmeasured = position >= len(self.digests) or not self.digests[position]
        if unmeasured or stop <= start:
            filler = (*shape[1:-1], max(0, stop - start))
            return np.full(filler, np.nan, VARIABLES[self.name].dtype)
        first, last = start // width, -(-stop // width)
        chunks = [self._read_chunk(position, number, width) for number in range(first, last)]
        whole = chunks[0] if len(chunks) == 1 else np.concatenate(chunks, axis=-1)
        return whole[..., start - first * width : stop - first * width]

    def damage(self) -> Iterator[str]:
        """Yield a description of each chunk that differs from the one that was written."""
        width = self.layout.chunk(self.name)[-1]
        for position, digests in enumerate(self.digests):
            for number in range(len(digests)):
                try:
                    self._read_chunk(position, number, width)
                except RecordError as error:
                    yield f"{self._describe(position)}: {error.got}"

    def _read_chunk(self, position: int, number: int, width: int) -> np.ndarray:
        epoch = self.layout.positions(self.name)[position]
        record = next(name for first, name in reversed(self.parts) if first <= epoch)
        prefix = f"{self.trial.path}/" if self.trial.path else ""
        expected = self.digests[position][number]
        try:
            array = open_array(self.trial.root, f"{prefix}{record}/{self.name}")
            values = np.asarray(array[position, ..., number * width : (number + 1) * width])
            actual = digest(values)
        except StoreError:
            raise  # the store cannot be reached; the chunk may be intact
        except Exception as error:  # of Zarr or any codec, depending on the damage
            actual = first_line(error)
        if actual != expected:
            raise RecordError(
                expected=f"a chunk with digest {expected[:16]}",
                got=actual if len(actual) != len(expected) else actual[:16],
                where=f"{self.trial}/{record}, {self._describe(position)}",
                todo="run sweeps/status.py OUT --withdraw, which takes damaged trials out of the "
                "study, and then the study again, which trains them again",
            )
        return values

    def _describe(self, position: int) -> str:
        dim = VARIABLES[self.name].dims[0]
        return f"{self.name}, {dim} {self.layout.positions(self.name)[position]}"


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
    commit = trial.read_json("COMMIT.json")
    if kind == "final_nll":
        nll = StoredVariable.of(trial, "nll", layout, commit)
        return nll.read(layout.epoch - 1).astype(np.float64)
    importance = StoredVariable.of(trial, "importance", layout, commit)
    tau = np.zeros(layout.sample)
    for position in range(layout.epoch):
        tau += importance.read(position).sum(axis=0, dtype=np.float64)
    return tau
