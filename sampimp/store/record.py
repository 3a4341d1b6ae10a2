"""Write one attempt at a trial or another record: record, checkpoints, commit.

    OUT/trials/mnist-nlo-seed3-1f0c9a2b/
        trial.json                       configuration, versions and machine
        attempts/0001.json               host, process, start time; the highest number may write
        record.zarr                      the arrays of `sampimp.schema`, by the first attempt
        record-2.zarr                    the epochs from where the second attempt went on
        checkpoints/epoch-000012-attempt-0002/    state.pt, then MANIFEST.json
        errors/0001.json                 how an attempt failed
        snapshots.zarr                   `snapshot_importance`, if it was scored
        COMMIT.json                      written last: which record holds which epochs, digests

A file that exists may be incomplete: a checkpoint is valid when its manifest exists and its state
and all earlier epochs of the record match their digests; a record is valid when COMMIT.json exists.
Every object is stored whole or not at all, and one write is one whole chunk. Records of influence
and of retraining (OUT/influence/ID) are written in the same way; their layout says what their steps
are. Two attempts at a trial may overlap: `sampimp.store.attempts` says what happens then.

Map: `TrialRecord` (the writer), `History` (its progress, stored in checkpoints and in the commit).
"""

import hashlib
import socket
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from sampimp.errors import RecordError, UserError
from sampimp.schema import (
    COMMITTED,
    VARIABLES,
    EpochRecord,
    RecordLayout,
    StepRecord,
    variable,
)
from sampimp.store.attempts import CHECKPOINTS, ERRORS, claim_attempt, require_newest, superseded
from sampimp.store.integrity import chunk_digests, find_damage
from sampimp.store.location import Folder
from sampimp.store.variables import file_path
from sampimp.store.zarr_arrays import require_array, require_group

KEPT_CHECKPOINTS = 2
"""The newest checkpoint, and the previous one in case writing the newest was interrupted."""


@dataclass
class History:
    """The content of a record so far, by step; stored in each checkpoint's manifest.

    The steps of a trial are its epochs.
    """

    parts: list[tuple[int, str]] = field(default_factory=list)
    """First step (0 is the initial state) and name of each record that holds part of the trial."""
    digests: dict[str, list[list[str]]] = field(default_factory=dict)
    """By variable: SHA-256 of each chunk that each step (or stored state) wrote."""
    curves: dict[str, list[Any]] = field(default_factory=dict)
    """By variable of `COMMITTED`: its value, or list of values, of each step."""
    seconds: list[float] = field(default_factory=list)
    """Seconds that each step took; of an epoch, to train and evaluate."""


class TrialRecord:
    """One attempt at a trial, and the only writer of its record.

    Parameters
    ----------
    folder
        OUT/trials/ID, or OUT/influence/ID.
    identity
        Identity of the trial; its "fingerprint" is compared with that of every checkpoint.
    layout
        The shape of its record, and its steps.
    """

    def __init__(self, folder: Folder, identity: Mapping[str, Any], layout: RecordLayout) -> None:
        self.folder, self.identity, self._layout = folder, dict(identity), layout
        self.attempt = claim_attempt(folder)
        self._name = "record.zarr" if self.attempt == 1 else f"record-{self.attempt}.zarr"
        self.history = History(parts=[(0, self._name)])
        group = require_group(folder / self._name)
        self._arrays = {
            name: require_array(group, name, layout)
            for name in layout.variables
            if variable(name).dtype != "bytes"
        }

    def write(self, record: EpochRecord | StepRecord) -> None:
        """Write one step: whole chunks of each variable; the curves follow with the commit.

        Raises
        ------
        SupersededError
            A newer attempt has begun.
        """
        self._require_newest()
        chunked = {name: v for name, v in record.arrays.items() if name not in COMMITTED}
        with ThreadPoolExecutor(len(VARIABLES)) as pool:  # each put to a bucket takes tens of ms
            stored = pool.map(lambda name: self._put(record.step, name, chunked[name]), chunked)
            for name, digests in zip(chunked, stored, strict=True):
                self.history.digests.setdefault(name, []).append(digests)
        for name in COMMITTED:
            if name in record.arrays:
                value = np.asarray(record.arrays[name], np.float64).tolist()
                self.history.curves.setdefault(name, []).append(value)
        if record.step:
            self.history.seconds.append(record.seconds)

    def _put(self, step: int, name: str, values: Any) -> list[str]:
        """Write what a step holds of a variable; return the digest of each chunk."""
        if isinstance(values, bytes):
            self.folder.write_bytes(file_path(self._name, name, step), values)
            return [hashlib.sha256(values).hexdigest()]
        position = self._layout.positions(name).index(step)
        index = position if self._layout.is_stepwise(name) else ...
        self._arrays[name][index] = values
        return chunk_digests(values, self._arrays[name].chunks[-1])

    def checkpoint(self, epoch: int, state: bytes) -> None:
        """Store a state to resume from, its manifest last; delete all but the newest two."""
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
        """Return epoch and state of the newest checkpoint that verifies, or None to start anew.

        A checkpoint verifies if its state and every earlier epoch of the record have their digests.
        One that does not is deleted, since `checkpoint` keeps those of the highest epochs.
        """
        for name in reversed((self.folder / CHECKPOINTS).folders()):
            folder = self.folder / CHECKPOINTS / name
            try:
                manifest = folder.read_json("MANIFEST.json")
            except RecordError:
                manifest = None
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
            folder.remove()
        return None

    def fail(self, error: BaseException) -> None:
        """Store how this attempt failed, with the traceback."""
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

    def commit(
        self, diverged_epoch: int | None, facts: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Declare the record complete; from now on readers see it.

        Parameters
        ----------
        diverged_epoch
            The epoch in which the run diverged, its last; None if it did not.
        facts
            Further entries of the commit, known only at the end.

        Raises
        ------
        SupersededError
            A newer attempt has begun, or another one has committed.
        """
        self._require_newest()
        epochs = len(self.history.seconds)
        parts = [part for part in self.history.parts if part[0] <= epochs]
        commit = {
            **self.identity,
            **facts,
            "attempt": self.attempt,
            "epochs": epochs,
            "diverged_epoch": diverged_epoch,
            **vars(self.history),
            "parts": parts,
        }
        for name, curve in self.history.curves.items():
            values = np.full(self._layout.shape(name), np.nan)
            values[self._layout.order(name)[: len(curve)]] = curve
            self._arrays[name][:] = values
        if not self.folder.create_json("COMMIT.json", commit):
            raise superseded(self.folder, self.attempt, "COMMIT.json of another attempt")
        used = {name for _, name in parts}
        for name in self.folder.folders():
            if name.startswith("record") and name not in used:
                (self.folder / name).remove()

    def _require_newest(self) -> None:
        require_newest(self.folder, self.attempt)
