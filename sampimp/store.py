"""The store: one folder or bucket that holds a study, and the only module that knows Zarr.

    OUT/study.json                       the plan
    OUT/datasets/mnist.zarr              the data set's values and labels
    OUT/trials/mnist-nlo-seed3-1f0c9a2b/
        trial.json                       what the trial is, on which machine
        record.zarr                      the arrays of `sampimp.schema`
        checkpoints/epoch-0012/          state.pt, then MANIFEST.json: enough to go on
        COMMIT.json                      written last: what is complete, with digests

A trial has one writer, a write is a whole chunk, and what exists is not therefore complete: a
checkpoint counts when its manifest is there and its digest agrees, a record when COMMIT.json is
there. Every object is put whole or not at all (obstore renames a finished file; so does S3).

Map: `TrialRecord` (one trial's writer), `write_source` and `read_source` (data sets), `open_array`
(for readers).
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from sampimp.data import Source
from sampimp.errors import RecordError
from sampimp.folder import Folder, open_store, put_whole, reaching
from sampimp.schema import CURVES, VARIABLES, EpochRecord, chunk_shape, digest

KEPT_CHECKPOINTS = 2
"""The newest, and the one before in case the newest was cut off while it was written."""


@dataclass
class History:
    """What a record holds so far, by epoch; it travels in the checkpoint's manifest."""

    digests: dict[str, list[str]] = field(default_factory=dict)
    """Variable to the SHA-256 of its values at each epoch, or at each stored state."""
    curves: dict[str, list[float]] = field(default_factory=dict)
    """Curve to its value at each epoch."""
    seconds: list[float] = field(default_factory=list)
    """Seconds each epoch took to train and evaluate."""


class TrialRecord:
    """The one writer of a trial.

    Parameters
    ----------
    folder
        OUT/trials/ID.
    identity
        What the trial is; its "fingerprint" is compared with that of every checkpoint.
    sizes
        epoch, layer, sample, state and parameter: the sizes of the dimensions.
    states
        The states whose parameters are stored.
    """

    def __init__(
        self,
        folder: Folder,
        identity: Mapping[str, Any],
        sizes: Mapping[str, int],
        states: list[int],
    ) -> None:
        self.folder, self.identity, self.history = folder, dict(identity), History()
        self._states = {state: position for position, state in enumerate(states)}
        self._epochs = sizes["epoch"]
        group = zarr.open_group(zarr_store(folder / "record.zarr"), mode="a", zarr_format=3)
        self._arrays = {
            name: _require_array(group, name, {**sizes, "state": len(states)})
            for name in VARIABLES
            if name != "snapshot_importance" and (states or name != "parameters")
        }

    def write(self, record: EpochRecord) -> None:
        """Write one epoch: a whole chunk of each variable, and the curves so far."""
        for name, values in record.arrays.items():
            if name in CURVES:
                self.history.curves.setdefault(name, []).append(float(values))
                whole = np.full(self._epochs, np.nan)
                whole[: record.epoch] = self.history.curves[name]
                self._arrays[name][:] = whole
                continue
            position = self._states[record.epoch] if name == "parameters" else record.epoch - 1
            self._arrays[name][position] = values
            self.history.digests.setdefault(name, []).append(digest(values))
        if record.epoch:
            self.history.seconds.append(record.seconds)

    def checkpoint(self, epoch: int, state: bytes) -> None:
        """Store a state to go on from, its manifest last, and drop all but the newest two."""
        folder = self.folder / "checkpoints" / f"epoch-{epoch:06d}"
        folder.write_bytes("state.pt", state)
        folder.write_json(
            "MANIFEST.json",
            {
                "fingerprint": self.identity["fingerprint"],
                "epoch": epoch,
                "sha256": hashlib.sha256(state).hexdigest(),
                "history": vars(self.history),
            },
        )
        for name in (self.folder / "checkpoints").folders()[:-KEPT_CHECKPOINTS]:
            (self.folder / "checkpoints" / name).remove()

    def newest_checkpoint(self) -> tuple[int, bytes] | None:
        """Return epoch and state of the newest checkpoint that verifies; None to start anew."""
        for name in reversed((self.folder / "checkpoints").folders()):
            folder = self.folder / "checkpoints" / name
            try:
                manifest = folder.read_json("MANIFEST.json")
            except RecordError:
                continue
            state = folder.read_bytes("state.pt")
            if (
                manifest
                and state is not None
                and manifest["fingerprint"] == self.identity["fingerprint"]
                and manifest["sha256"] == hashlib.sha256(state).hexdigest()
            ):
                self.history = History(**manifest["history"])
                return manifest["epoch"], state
        return None

    def commit(self, diverged_epoch: int | None) -> None:
        """Declare the record complete; from now on readers see it.

        Parameters
        ----------
        diverged_epoch
            The epoch in which the run diverged, its last; None if it did not.
        """
        self.folder.write_json(
            "COMMIT.json",
            {
                **self.identity,
                "epochs": len(self.history.seconds),
                "diverged_epoch": diverged_epoch,
                "digests": self.history.digests,
                "curves": self.history.curves,
                "seconds": self.history.seconds,
            },
        )


def record_digest(commit: Mapping[str, Any]) -> str:
    """Return the digest that stands for all that a committed record says of its samples."""
    digests = commit["digests"]
    text = json.dumps([digests["importance"], digests["nll"]])
    return hashlib.sha256(text.encode()).hexdigest()


def _require_array(group: zarr.Group, name: str, sizes: Mapping[str, int]) -> zarr.Array:
    variable = VARIABLES[name]
    if name in group:
        array = group[name]
        assert isinstance(array, zarr.Array)
        return array
    return group.create_array(
        name,
        shape=tuple(sizes[dim] for dim in variable.dims),
        chunks=chunk_shape(name, sizes),
        dtype=variable.dtype,
        fill_value=np.nan,
        dimension_names=variable.dims,
        attributes={"units": variable.units, "long_name": variable.long_name},
        # Parameters are noise to a compressor: zstd saved 8 % and took four times as long.
        compressors=None if name == "parameters" else "auto",
    )


def write_array(
    trial: Folder, name: str, sizes: Mapping[str, int], position: int, values: np.ndarray
) -> str:
    """Write one epoch of a variable into a finished record, and return its digest.

    Parameters
    ----------
    trial
        OUT/trials/ID.
    name, sizes
        The variable, and the size of each of its dimensions in case it is not there yet.
    position
        Along the first dimension.
    values
        Shape of the other dimensions.
    """
    group = zarr.open_group(zarr_store(trial / "record.zarr"), mode="a", zarr_format=3)
    _require_array(group, name, sizes)[position] = values
    return digest(values)


class _Store(ObjectStore):
    """A folder or bucket as Zarr sees it, with the errors of `sampimp.folder`."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        with reaching(f"{key} of {self.store}"):
            return await super().get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        with reaching(f"{key} of {self.store}"):
            await put_whole(self.store, key, value.as_buffer_like())

    async def delete_dir(self, prefix: str) -> None:
        with reaching(f"{prefix} of {self.store}"):
            await super().delete_dir(prefix)


def zarr_store(folder: Folder) -> ObjectStore:
    """Return a folder as a Zarr store."""
    return _Store(open_store(str(folder)))


@functools.lru_cache(maxsize=4096)
def open_array(root: str, path: str) -> zarr.Array:
    """Open an array of a study for reading."""
    return zarr.open_array(_Store(open_store(root)), path=path, mode="r", zarr_format=3)


def write_source(folder: Folder, source: Source) -> None:
    """Store a data set: its values before scaling, and its labels."""
    group = zarr.open_group(zarr_store(folder), mode="w", zarr_format=3)
    for part in ("train", "test"):
        for kind in ("values", "labels"):
            values = getattr(source, f"{part}_{kind}")
            rows = max(1, min(len(values), 2**22 // max(1, values[0].nbytes)))  # chunks of 4 MiB
            array = group.create_array(
                f"{part}_{kind}",
                shape=values.shape,
                chunks=(rows, *values.shape[1:]),
                dtype=values.dtype,
                attributes={"full_scale": source.full_scale} if kind == "values" else {},
            )
            array[:] = values
    group.attrs.update(  # last: without it the data set is not complete
        {
            "name": source.name,
            "class_names": list(source.class_names),
            "digest": source.digest,
        }
    )


def read_source(folder: Folder) -> Source | None:
    """Return a stored data set, or None if it is not there or not complete.

    Raises
    ------
    RecordError
        Its values are not those that were stored.
    """
    if folder.read_bytes("zarr.json") is None:
        return None
    group = zarr.open_group(zarr_store(folder), mode="r", zarr_format=3)
    attrs = dict(group.attrs)
    if "digest" not in attrs:
        return None
    source = Source(
        name=str(attrs["name"]),
        full_scale=float(group["train_values"].attrs["full_scale"]),  # type: ignore[arg-type]
        class_names=tuple(attrs["class_names"]),  # type: ignore[arg-type]
        **{
            f"{part}_{kind}": np.asarray(group[f"{part}_{kind}"][:])  # type: ignore[index]
            for part in ("train", "test")
            for kind in ("values", "labels")
        },
    )
    if source.digest != attrs["digest"]:
        raise RecordError(
            expected=f"a data set with digest {attrs['digest']}",
            got=source.digest,
            where=str(folder),
            todo="delete this folder; the data set is read again from its source",
        )
    return source


def read_difficulty(trial: Folder, kind: str) -> np.ndarray:
    """Return what the sorted strategies sort by, shape (sample,), float64.

    Parameters
    ----------
    trial
        OUT/trials/ID of a committed reference run.
    kind
        "final_nll", the NLL at the end of the last epoch in nats, or "overall_importance", tau: the
        sum of importance over layers and epochs, in parameter squared (paper, sections 2 and 3.6).
    """
    if kind == "final_nll":
        nll = open_array(trial.root, f"{trial.path}/record.zarr/nll")
        return np.asarray(nll[-1], np.float64)
    importance = open_array(trial.root, f"{trial.path}/record.zarr/importance")
    tau = np.zeros(importance.shape[-1])
    for epoch in range(importance.shape[0]):
        tau += np.asarray(importance[epoch]).sum(axis=0, dtype=np.float64)
    return tau
