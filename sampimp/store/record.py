"""The store: one folder or bucket that holds a study, and the only module that knows Zarr.

    OUT/study.json                       the plan
    OUT/datasets/mnist.zarr              the data set's values and labels
    OUT/trials/mnist-nlo-seed3-1f0c9a2b/
        trial.json                       what the trial is, on which machine
        attempts/0001.json               who tries it, and since when; the highest number may write
        record.zarr                      the arrays of `sampimp.schema`, by the first attempt
        record-2.zarr                    the epochs from where the second attempt went on
        checkpoints/epoch-000012-attempt-0002/    state.pt, then MANIFEST.json: enough to go on
        errors/0001.json                 how an attempt failed
        snapshots.zarr                   `snapshot_importance`, where it was asked for
        COMMIT.json                      written last: which epochs lie where, with digests

What exists is not therefore complete: a checkpoint counts when its manifest is there and all that
it names has the digest it should have, a record when COMMIT.json is there. Every object is put
whole or not at all, and a write is a whole chunk.

A worker that was cut off and a second one in its place may be at the same trial. Each attempt
therefore claims a number that nobody else gets, writes only where no other attempt writes, and
stops when it finds a higher number; the commit is put by one of them, and names the records that
its epochs are in.

Map: `TrialRecord` (one attempt's writer), `StoredVariable` (a reader, which compares every chunk
with its digest), `find_damage` and `withdraw`, `last_sign`, `write_snapshot` and
`stored_snapshots`, `read_difficulty`, `write_source`, `read_source` and `StoredSource` (data sets).
"""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import socket
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import ObjectStore

from sampimp.data import Source
from sampimp.errors import RecordError, StoreError, UserError
from sampimp.schema import CURVES, VARIABLES, EpochRecord, Layout, digest, digest_json
from sampimp.store.location import Folder, check_links, local_root, open_store, put_whole, reaching

KEPT_CHECKPOINTS = 2
"""The newest, and the one before in case the newest was cut off while it was written."""

SNAPSHOTS = "snapshots.json"
"""Which epochs of which trials have `snapshot_importance`, with digests; at the study's top."""


ATTEMPTS, CHECKPOINTS, ERRORS = "attempts", "checkpoints", "errors"
"""Folders of a trial."""

SOURCE_ARRAYS = ("train_values", "train_labels", "test_values", "test_labels")
"""The arrays of a data set."""

SOURCE_CHUNK = 2**22
"""Most bytes of one of their chunks, if one sample has no more (arbitrary)."""


class SupersededError(RecordError):
    """Somebody else has begun a newer attempt at the trial, so this one must stop."""


@dataclass
class History:
    """What a record holds so far, by epoch; it travels in the checkpoint's manifest."""

    parts: list[tuple[int, str]] = field(default_factory=list)
    """First epoch (0 is the initial state) and name of each record that holds a part of it."""
    digests: dict[str, list[list[str]]] = field(default_factory=dict)
    """Variable to the SHA-256 of each chunk, at each epoch or stored state."""
    curves: dict[str, list[float]] = field(default_factory=dict)
    """Curve to its value at each epoch."""
    seconds: list[float] = field(default_factory=list)
    """Seconds each epoch took to train and evaluate."""


class TrialRecord:
    """One attempt at a trial, and the only writer of its record.

    Parameters
    ----------
    folder
        OUT/trials/ID.
    identity
        What the trial is; its "fingerprint" is compared with that of every checkpoint.
    layout
        The shape of its record.
    """

    def __init__(self, folder: Folder, identity: Mapping[str, Any], layout: Layout) -> None:
        self.folder, self.identity, self._layout = folder, dict(identity), layout
        self.attempt = claim_attempt(folder)
        self._name = "record.zarr" if self.attempt == 1 else f"record-{self.attempt}.zarr"
        self.history = History(parts=[(0, self._name)])
        group = zarr.open_group(zarr_store(folder / self._name), mode="a", zarr_format=3)
        self._arrays = {name: _require_array(group, name, layout) for name in layout.variables}

    def write(self, record: EpochRecord) -> None:
        """Write one epoch: whole chunks of each variable; the curves follow with the commit.

        Raises
        ------
        SupersededError
            Another attempt has begun.
        """
        self._require_newest()
        chunked = {name: v for name, v in record.arrays.items() if name not in CURVES}

        def put(name: str) -> list[str]:
            position = self._layout.positions(name).index(record.epoch)
            self._arrays[name][position] = chunked[name]
            return chunk_digests(chunked[name], self._arrays[name].chunks[-1])

        with ThreadPoolExecutor(len(VARIABLES)) as pool:  # a bucket takes each in tens of ms
            for name, digests in zip(chunked, pool.map(put, chunked), strict=True):
                self.history.digests.setdefault(name, []).append(digests)
        for name in CURVES:
            if name in record.arrays:
                self.history.curves.setdefault(name, []).append(float(record.arrays[name]))
        if record.epoch:
            self.history.seconds.append(record.seconds)

    def checkpoint(self, epoch: int, state: bytes) -> None:
        """Store a state to go on from, its manifest last, and drop all but the newest two."""
        checkpoints = self.folder / CHECKPOINTS
        folder = checkpoints / f"epoch-{epoch:06d}-attempt-{self.attempt:04d}"
        folder.write_bytes("state.pt", state)
        folder.write_json(
            "MANIFEST.json",
            {
                "fingerprint": self.identity["fingerprint"],
                "epoch": epoch,
                "sha256": hashlib.sha256(state).hexdigest(),
                "time": time.time(),
                "history": vars(self.history),
            },
        )
        for name in checkpoints.folders()[:-KEPT_CHECKPOINTS]:
            (checkpoints / name).remove()

    def newest_checkpoint(self) -> tuple[int, bytes] | None:
        """Return epoch and state of the newest checkpoint that verifies; None to start anew.

        It verifies if the state and every epoch of the record until then have their digests.
        """
        for name in reversed((self.folder / CHECKPOINTS).folders()):
            folder = self.folder / CHECKPOINTS / name
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
                and not any(find_damage(self.folder, manifest["history"], self._layout))
            ):
                self.history = History(**manifest["history"])
                self.history.parts.append((manifest["epoch"] + 1, self._name))
                return manifest["epoch"], state
        return None

    def fail(self, error: BaseException) -> None:
        """Leave a word of how this attempt failed."""
        self.folder.write_json(
            f"{ERRORS}/{self.attempt:04d}.json",
            {
                "host": socket.gethostname(),
                "time": time.time(),
                "epoch": len(self.history.seconds),
                "error": error.summary if isinstance(error, UserError) else f"{error!r}",
                "traceback": "".join(traceback.format_exception(error)),
            },
        )

    def commit(self, diverged_epoch: int | None) -> None:
        """Declare the record complete; from now on readers see it.

        Parameters
        ----------
        diverged_epoch
            The epoch in which the run diverged, its last; None if it did not.

        Raises
        ------
        SupersededError
            Another attempt has begun, or has committed.
        """
        self._require_newest()
        epochs = len(self.history.seconds)
        parts = [part for part in self.history.parts if part[0] <= epochs]
        commit = {
            **self.identity,
            "attempt": self.attempt,
            "epochs": epochs,
            "diverged_epoch": diverged_epoch,
            **vars(self.history),
            "parts": parts,
        }
        for name, curve in self.history.curves.items():
            self._arrays[name][:] = np.pad(
                curve, (0, self._layout.epoch - epochs), constant_values=np.nan
            )
        if not self.folder.create_json("COMMIT.json", commit):
            self._refuse("COMMIT.json of another attempt")
        used = {name for _, name in parts}
        for name in self.folder.folders():
            if name.startswith("record") and name not in used:
                (self.folder / name).remove()

    def _require_newest(self) -> None:
        newer = _attempt_name(self.attempt + 1)
        if self.folder.read_bytes(newer) is not None:
            self._refuse(newer)

    def _refuse(self, found: str) -> None:
        raise SupersededError(
            expected=f"attempt {self.attempt} to be the newest at this trial",
            got=found,
            where=str(self.folder),
            todo="nothing: the other attempt goes on from the newest checkpoint",
        )


def claim_attempt(trial: Folder) -> int:
    """Return the number of a new attempt at a trial, which nobody else has."""
    numbers = [int(name.partition(".")[0]) for name in (trial / ATTEMPTS).files()]
    number = max(numbers, default=0) + 1
    claim = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "token": secrets.token_hex(8),
    }
    while not trial.create_json(_attempt_name(number), claim):
        number += 1
    return number


def _attempt_name(number: int) -> str:
    return f"{ATTEMPTS}/{number:04d}.json"


def chunk_digests(values: np.ndarray, width: int) -> list[str]:
    """Return the digest of each chunk of one epoch's values, `width` long on the last dimension.

    Examples
    --------
    >>> values = np.arange(6.0).reshape(2, 3)
    >>> chunk_digests(values, 2) == [digest(values[:, :2]), digest(values[:, 2:])]
    True
    """
    starts = range(0, values.shape[-1], width)
    return [digest(values[..., start : start + width]) for start in starts]


@dataclass(frozen=True)
class StoredVariable:
    """One variable of a trial, each chunk compared with its digest when it is read.

    Parameters
    ----------
    trial
        OUT/trials/ID.
    name
        Of the variable.
    layout
        The shape of the trial's record.
    parts
        As `History.parts`.
    digests
        Of each chunk at each position along the first dimension; where there is none, all is NaN.
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
            What is stored is not what was written.
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
        """Yield in words each place that does not hold what was written."""
        width = self.layout.chunk(self.name)[-1]
        for position, digests in enumerate(self.digests):
            for number in range(len(digests)):
                try:
                    self._read_chunk(position, number, width)
                except RecordError as error:
                    yield f"{self._place(position)}: {error.got}"

    def _read_chunk(self, position: int, number: int, width: int) -> np.ndarray:
        epoch = self.layout.positions(self.name)[position]
        record = next(name for first, name in reversed(self.parts) if first <= epoch)
        prefix = f"{self.trial.path}/" if self.trial.path else ""
        expected = self.digests[position][number]
        try:
            array = open_array(self.trial.root, f"{prefix}{record}/{self.name}")
            values = np.asarray(array[position, ..., number * width : (number + 1) * width])
            found = digest(values)
        except StoreError:
            raise  # the store cannot be reached, which says nothing of what it holds
        except Exception as error:  # of Zarr and of each codec, as the damage happens to fall
            found = str(error).partition("\n")[0] or type(error).__name__
        if found != expected:
            raise RecordError(
                expected=f"a chunk with digest {expected[:16]}",
                got=found if len(found) != len(expected) else found[:16],
                where=f"{self.trial}/{record}, {self._place(position)}",
                todo="run sweeps/status.py OUT --withdraw, which takes damaged trials out of the "
                "study, and then the study again, which trains them again",
            )
        return values

    def _place(self, position: int) -> str:
        dim = VARIABLES[self.name].dims[0]
        return f"{self.name}, {dim} {self.layout.positions(self.name)[position]}"


def find_damage(trial: Folder, history: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """Yield in words what is not as a trial's COMMIT.json, or a checkpoint's history, says."""
    for name in history["digests"]:
        yield from StoredVariable.of(trial, name, layout, history).damage()


@dataclass(frozen=True)
class LastSign:
    """The last that a trial's attempts have left in the store."""

    attempt: int
    host: str
    epoch: int
    """Of the newest checkpoint; 0 if there is none."""
    time: float
    """Of the newest checkpoint or, if that is later, of the attempt's beginning or failure."""
    epoch_seconds: float
    """How long an epoch takes; 0 if none is known."""
    error: str | None
    """How the newest attempt failed; None if it did not."""


def last_sign(trial: Folder) -> LastSign | None:
    """Return what is known of a trial that is not committed, or None if nobody has begun it."""
    attempts = (trial / ATTEMPTS).files()
    if not attempts:
        return None
    begun = trial.read_json(f"{ATTEMPTS}/{attempts[-1]}")
    failure = trial.read_json(f"{ERRORS}/{attempts[-1]}")
    manifest = None
    for name in reversed((trial / CHECKPOINTS).folders()):
        with contextlib.suppress(RecordError):
            manifest = trial.read_json(f"{CHECKPOINTS}/{name}/MANIFEST.json")
        if manifest is not None:
            break
    seconds = manifest["history"]["seconds"] if manifest else []
    return LastSign(
        attempt=int(attempts[-1].partition(".")[0]),
        host=begun["host"],
        epoch=manifest["epoch"] if manifest else 0,
        time=max(entry["time"] for entry in (begun, failure, manifest) if entry),
        epoch_seconds=sum(seconds) / len(seconds) if seconds else 0.0,
        error=failure["error"] if failure else None,
    )


def withdraw(trial: Folder) -> None:
    """Take a trial's commit back: readers no longer see it, and the study trains it again.

    What it said is kept beside it, and a new attempt writes a record of its own.
    """
    commit = trial.read_json("COMMIT.json")
    trial.write_json(f"withdrawn/{commit['attempt']:04d}.json", commit)
    trial.delete("COMMIT.json")


def record_digest(commit: Mapping[str, Any]) -> str:
    """Return the digest that stands for all that a committed record says of its samples."""
    digests = commit["digests"]
    text = json.dumps([digests["importance"], digests["nll"]])
    return hashlib.sha256(text.encode()).hexdigest()


def _require_array(group: zarr.Group, name: str, layout: Layout) -> zarr.Array:
    variable = VARIABLES[name]
    if name not in group:
        with contextlib.suppress(ContainsArrayError):  # made since, see `write_snapshot`
            group.create_array(
                name,
                shape=layout.shape(name),
                chunks=layout.chunk(name),
                dtype=variable.dtype,
                fill_value=np.nan,
                dimension_names=variable.dims,
                attributes={"units": variable.units, "long_name": variable.long_name},
                # Parameters are noise to a compressor: zstd saved 8 % and took four times as long.
                compressors=None if name == "parameters" else "auto",
            )
    array = group[name]
    assert isinstance(array, zarr.Array)
    # By default Zarr leaves out a chunk that is all NaN, as that of a diverged epoch: it could not
    # be told from one that is lost, and would be read as another NaN than the one of its digest.
    return array.with_config({"write_empty_chunks": True})


def write_snapshot(trial: Folder, layout: Layout, epoch: int, values: np.ndarray) -> list[str]:
    """Write `snapshot_importance` of one epoch beside a record; return its chunks' digests.

    Parameters
    ----------
    trial
        OUT/trials/ID.
    layout
        The shape of its record.
    epoch
        1-based.
    values
        Shape (layer, sample).
    """
    name = "snapshot_importance"
    store = zarr_store(trial / "snapshots.zarr")
    # Several workers score the epochs of one trial, and may all find the group or array missing.
    try:
        group = zarr.open_group(store, mode="a", zarr_format=3)
    except ContainsGroupError:
        group = zarr.open_group(store, mode="r+", zarr_format=3)
    array = _require_array(group, name, layout)
    array[layout.positions(name).index(epoch)] = values
    return chunk_digests(values, array.chunks[-1])


def stored_snapshots(
    trial: Folder, layout: Layout, digests: Mapping[str, list[str]]
) -> StoredVariable:
    """Return a trial's `snapshot_importance` from its entry, by epoch, in `SNAPSHOTS`."""
    by_epoch = [digests.get(str(epoch), []) for epoch in range(1, layout.epoch + 1)]
    history = {"parts": [(0, "snapshots.zarr")], "digests": {"snapshot_importance": by_epoch}}
    return StoredVariable.of(trial, "snapshot_importance", layout, history)


class _Store(ObjectStore):
    """A folder or bucket as Zarr sees it, with the errors and the rule of links of `folder`."""

    def _check(self, key: str) -> None:
        if (root := local_root(self.store)) is not None:
            check_links(root, key)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self._check(key)
        with reaching(f"{key} of {self.store}"):
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        ranges = list(key_ranges)
        for key, _ in ranges:
            self._check(key)
        with reaching(self.store):
            return await super().get_partial_values(prototype, ranges)

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        self._check(key)
        with reaching(f"{key} of {self.store}"):
            await put_whole(self.store, key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        # Zarr asks this for the groups above an array, which are there. A get is asked again where
        # a server dies, a conditional put is not.
        if await self.get(key, default_buffer_prototype()) is None:
            with reaching(f"{key} of {self.store}"):
                await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        self._check(key)
        with reaching(f"{key} of {self.store}"):
            await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        if (root := local_root(self.store)) is not None:
            (Folder(root) / prefix).remove()
            return
        with reaching(f"{prefix} of {self.store}"):
            await super().delete_dir(prefix)


def zarr_store(folder: Folder) -> ObjectStore:
    """Return a folder as a Zarr store."""
    if folder.is_local:
        check_links(folder.root, folder.path)
    return _Store(open_store(str(folder)))


@functools.lru_cache(maxsize=4096)
def open_array(root: str, path: str) -> zarr.Array:
    """Open an array of a study for reading."""
    return zarr.open_array(_Store(open_store(root)), path=path, mode="r", zarr_format=3)


def chunk_table(source: Source) -> dict[str, Any]:
    """Return how a data set is stored, with each chunk's digest, in types that JSON can hold."""
    arrays = {}
    for name in SOURCE_ARRAYS:
        values = getattr(source, name)
        rows = max(1, min(len(values), SOURCE_CHUNK // max(1, values[0].nbytes)))
        starts = range(0, len(values), rows)
        arrays[name] = {
            "shape": list(values.shape),
            "dtype": values.dtype.str,
            "rows": rows,
            "digests": [digest(values[start : start + rows]) for start in starts],
        }
    return {"full_scale": source.full_scale, "arrays": arrays}


def write_source(folder: Folder, source: Source) -> None:
    """Store a data set: its values before scaling, its labels, and the digest of each chunk."""
    group = zarr.open_group(zarr_store(folder), mode="w", zarr_format=3)
    table = chunk_table(source)
    for name, stored in table["arrays"].items():
        values = getattr(source, name)
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=(stored["rows"], *values.shape[1:]),
            dtype=values.dtype,
            attributes={"full_scale": source.full_scale} if name.endswith("values") else {},
        )
        array[:] = values
    # Last, and by one put: without them the data set is not complete.
    group.update_attributes(
        {
            "name": source.name,
            "class_names": list(source.class_names),
            "digest": source.digest,
            "chunks": table,
        }
    )


def open_for_writing(folder: Folder, name: str) -> zarr.Array:
    """Open an array of a store that is there, to write into it and to read it back."""
    return zarr.open_array(zarr_store(folder), path=name, mode="r+", zarr_format=3)


@dataclass(frozen=True)
class StoredSource:
    """A data set of a study, each chunk compared with its digest when it is read.

    Parameters
    ----------
    folder
        OUT/datasets/KEY.zarr.
    attrs
        What is said of it beside its arrays.
    table
        As `chunk_table`; without "digests" where the data set was stored by an earlier version.
    """

    folder: Folder
    attrs: Mapping[str, Any]
    table: Mapping[str, Any]

    @property
    def is_verifiable(self) -> bool:
        """Whether its chunks have digests."""
        return "chunks" in self.attrs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the rows of one array from `start` to `stop`.

        Raises
        ------
        RecordError
            What is stored is not what was written.
        """
        shape, rows = self.table["arrays"][name]["shape"], self.table["arrays"][name]["rows"]
        stop = shape[0] if stop is None else stop
        first, last = start // rows, -(-stop // rows)
        chunks = [self._read_chunk(name, number) for number in range(first, last)]
        return np.concatenate(chunks)[start - first * rows : stop - first * rows]

    def damage(self) -> Iterator[str]:
        """Yield in words each place that does not hold what was written."""
        for name, stored in self.table["arrays"].items():
            for number in range(len(stored.get("digests", ()))):
                try:
                    self._read_chunk(name, number)
                except RecordError as error:
                    yield f"{self._place(name, number)}: {error.got}"

    def _read_chunk(self, name: str, number: int) -> np.ndarray:
        stored = self.table["arrays"][name]
        start, stop = number * stored["rows"], (number + 1) * stored["rows"]
        try:
            array = _open_uncached(self.folder, name)
            form = [list(array.shape), array.dtype.str]
            values = np.asarray(array[start:stop])
            found = digest(values)
            if form != [stored["shape"], stored["dtype"]]:
                found = f"an array {form[1]} {form[0]}"
        except StoreError:
            raise  # the store cannot be reached, which says nothing of what it holds
        except Exception as error:  # of Zarr and of each codec, as the damage happens to fall
            found = str(error).partition("\n")[0] or type(error).__name__
        expected = stored["digests"][number] if "digests" in stored else found
        if found != expected:
            raise _source_error(
                expected=f"a chunk with digest {expected[:16]}, in the data set with digest "
                f"{self.attrs['digest']}",
                got=found[:16] if len(found) == len(expected) else found,
                where=f"{self.folder}, {self._place(name, number)}",
            )
        return values

    def _place(self, name: str, number: int) -> str:
        rows = self.table["arrays"][name]["rows"]
        last = min((number + 1) * rows, self.table["arrays"][name]["shape"][0]) - 1
        return f"{name}, rows {number * rows} to {last}"


def _source_error(expected: str, got: str, where: str) -> RecordError:
    return RecordError(
        expected=expected,
        got=got,
        where=where,
        todo="delete this data set's folder and run the study's own command again: the data set is "
        "read from its source, and stored again",
    )


def _open_uncached(folder: Folder, name: str) -> zarr.Array:
    return zarr.open_array(zarr_store(folder), path=name, mode="r", zarr_format=3)


def open_source(
    folder: Folder, expected_digest: str | None = None, expected_chunks: str = ""
) -> StoredSource | None:
    """Return a stored data set, of which nothing is read; None if it is not there or not complete.

    Parameters
    ----------
    folder
        OUT/datasets/KEY.zarr.
    expected_digest, expected_chunks
        What the plan says of it; nothing is compared where it says nothing.

    Raises
    ------
    RecordError
        It is not the one of the plan.
    """
    attrs = (folder.read_json("zarr.json") or {}).get("attributes", {})
    if "digest" not in attrs:
        return None
    table = attrs.get("chunks")
    for what, found, expected in (
        ("digest", attrs["digest"], expected_digest or attrs["digest"]),
        ("digests of its chunks", digest_json(table), expected_chunks or digest_json(table)),
    ):
        if found != expected:
            raise _source_error(
                expected=f"the data set of the plan, {what} {expected[:16]}",
                got="none" if table is None and what != "digest" else found[:16],
                where=f"{folder}/zarr.json",
            )
    if table is None:
        table = _table_without_digests(folder)
    return StoredSource(folder, attrs, table)


def _table_without_digests(folder: Folder) -> dict[str, Any]:
    try:
        arrays = {name: _open_uncached(folder, name) for name in SOURCE_ARRAYS}
        return {
            "full_scale": arrays["train_values"].attrs["full_scale"],
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
            got=str(error).partition("\n")[0] or type(error).__name__,
            where=str(folder),
        ) from None


def read_source(folder: Folder) -> Source | None:
    """Return a stored data set, or None if it is not there or not complete.

    Raises
    ------
    RecordError
        Its values are not those that were stored.
    """
    stored = open_source(folder)
    if stored is None:
        return None
    source = Source(
        name=stored.attrs["name"],
        full_scale=stored.table["full_scale"],
        class_names=tuple(stored.attrs["class_names"]),
        **{name: stored.read(name) for name in SOURCE_ARRAYS},
    )
    if source.digest != stored.attrs["digest"]:
        raise _source_error(
            expected=f"a data set with digest {stored.attrs['digest']}",
            got=source.digest,
            where=str(folder),
        )
    return source


def read_difficulty(trial: Folder, kind: str, layout: Layout) -> np.ndarray:
    """Return what the sorted strategies sort by, shape (sample,), float64.

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
