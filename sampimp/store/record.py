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
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import numpy as np

from sampimp.errors import StoreError, UserError, redacted
from sampimp.schema import (
    COMMITTED,
    VARIABLES,
    EpochRecord,
    RecordLayout,
    StepRecord,
    variable,
)
from sampimp.store.attempts import (
    ATTEMPTS,
    CHECKPOINTS,
    ERRORS,
    MANIFEST,
    Trace,
    claim_attempt,
    read_manifest,
    require_newest,
    superseded,
)
from sampimp.store.commits import WITHDRAWN, create_commit, remove_damaged_commit
from sampimp.store.integrity import chunk_digests, find_damage
from sampimp.store.location import Folder
from sampimp.store.seals import json_bytes, seal
from sampimp.store.variables import file_path, holds_steps
from sampimp.store.zarr_arrays import require_array, require_group

KEPT_CHECKPOINTS = 2
"""The newest checkpoint, and the previous one in case writing the newest was interrupted."""

SYNC_EVERY = 15.0
"""Seconds after which an epoch's end is made durable. With epochs of up to 15 s, a power cut loses
at most 30 s of training; longer epochs are all made durable, and it loses one."""


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
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file, by its path in the folder of the trial."""


def _is_record(path: str) -> bool:
    return path.startswith("record")


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
    seen
        As `claim_attempt` takes it.

    Raises
    ------
    SupersededError
        Another attempt has gone on since `seen`.
    """

    def __init__(
        self,
        folder: Folder,
        identity: Mapping[str, Any],
        layout: RecordLayout,
        seen: Trace | None = None,
    ) -> None:
        self.folder, self.identity, self._layout = folder, dict(identity), layout
        remove_damaged_commit(folder)
        self.attempt = claim_attempt(folder, seen)
        self._name = "record.zarr" if self.attempt == 1 else f"record-{self.attempt}.zarr"
        self.history = self._begun = History(parts=[(0, self._name)])
        self._synced, self._durable = time.monotonic(), ""
        self._checkpoint_files: dict[str, str] = {}  # their digests, by path
        group = require_group(folder / self._name, self._note_array)
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
            path = file_path(self._name, name, step)
            self.folder.write_bytes(path, values, durable=False)
            self._note(path, values)
            return [self.history.files[path]]
        position = self._layout.positions(name).index(step)
        index = position if self._layout.is_stepwise(name) else ...
        self._arrays[name][index] = values
        return chunk_digests(values, self._arrays[name].chunks[-1])

    def _note(self, path: str, content: Any) -> None:
        self.history.files[path] = hashlib.sha256(content).hexdigest()

    def _note_array(self, key: str, content: Any) -> None:
        self._note(f"{self._name}/{key}", content)

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Store trial.json: the identity of the trial and further facts."""
        content = json_bytes({**self.identity, **facts})
        self.folder.write_bytes("trial.json", content)
        self._note("trial.json", content)

    def checkpoint(self, epoch: int, state: bytes) -> None:
        """Store a state to resume from, its manifest last; delete old ones.

        Every `SYNC_EVERY` seconds, the record and the checkpoint are made durable. The newest two
        checkpoints are kept, and the newest durable one.

        Raises
        ------
        StoreError
            The disk refuses to write. If it could not make the record durable, no checkpoint since
            the newest durable one is kept, since its data may be lost without a further error.
        """
        durable = time.monotonic() - self._synced >= SYNC_EVERY
        checkpoints = self.folder / CHECKPOINTS
        name = f"epoch-{epoch:06d}-attempt-{self.attempt:04d}"
        manifest = {
            "fingerprint": self.identity["fingerprint"],
            "epoch": epoch,
            "sha256": hashlib.sha256(state).hexdigest(),
            "time": time.time(),
            "durable": durable,
            "history": vars(self.history),
        }
        if durable:
            self._sync()
        for file, content in (("state.pt", state), (MANIFEST, seal(manifest))):
            (checkpoints / name).write_bytes(file, content, durable=durable)
            digest = hashlib.sha256(content).hexdigest()
            self._checkpoint_files[f"{CHECKPOINTS}/{name}/{file}"] = digest
        if durable:
            self._synced, self._durable = time.monotonic(), name
        for old in checkpoints.folders()[:-KEPT_CHECKPOINTS]:
            if old != self._durable:
                (checkpoints / old).remove()

    def _sync(self) -> None:
        """Make durable what was written; if that fails, delete the checkpoints that rely on it."""
        try:
            self.folder.sync()
        except StoreError:
            checkpoints = self.folder / CHECKPOINTS
            for name in checkpoints.folders():
                manifest = read_manifest(checkpoints / name) or {}
                if name != self._durable and not manifest.get("durable"):
                    (checkpoints / name).remove()
            raise

    def newest_checkpoint(self) -> tuple[int, bytes] | None:
        """Return epoch and state of the newest checkpoint that verifies, or None to start anew.

        A checkpoint verifies if its state and every earlier epoch of the record have their digests.
        One that does not is deleted, since `checkpoint` keeps those of the highest epochs.
        """
        for name in reversed((self.folder / CHECKPOINTS).folders()):
            folder = self.folder / CHECKPOINTS / name
            manifest = read_manifest(folder)
            state = folder.read_bytes("state.pt")
            if (
                manifest
                and state is not None
                and manifest["fingerprint"] == self.identity["fingerprint"]
                and manifest["epoch"] <= self._layout.steps
                and manifest["sha256"] == hashlib.sha256(state).hexdigest()
                and holds_steps(manifest["history"], self._layout, manifest["epoch"])
                and not any(find_damage(self.folder, manifest["history"], self._layout))
            ):
                known = {each.name for each in fields(History)}
                stored = {k: v for k, v in manifest["history"].items() if k in known}
                self.history = History(**stored)
                self.history.files |= self._begun.files  # of this attempt
                self.history.parts.append((manifest["epoch"] + 1, self._name))
                self._sync()  # after the death of a process, this checkpoint may not be durable
                self._synced, self._durable = time.monotonic(), name
                return manifest["epoch"], state
            folder.remove()
        return None

    def discard_checkpoint(self) -> None:
        """Delete the checkpoint that `newest_checkpoint` returned, which cannot be loaded."""
        (self.folder / CHECKPOINTS / self._durable).remove()
        self.history, self._durable = self._begun, ""

    def fail(self, error: BaseException) -> None:
        """Store how this attempt failed, with the traceback."""
        self.folder.write_json(
            f"{ERRORS}/{self.attempt:04d}.json",
            {
                "host": socket.gethostname(),
                "time": time.time(),
                "epoch": len(self.history.seconds),
                "error": redacted(error.summary if isinstance(error, UserError) else f"{error!r}"),
                "traceback": redacted("".join(traceback.format_exception(error))),
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
        for name, curve in self.history.curves.items():
            values = np.full(self._layout.shape(name), np.nan)
            values[self._layout.order(name)[: len(curve)]] = curve
            self._arrays[name][:] = values
        self._sync()
        checkpoints = self.folder / CHECKPOINTS
        for name in checkpoints.folders()[:-KEPT_CHECKPOINTS]:
            (checkpoints / name).remove()
        used = {name for _, name in parts}
        commit = {
            **self.identity,
            **facts,
            "attempt": self.attempt,
            "epochs": epochs,
            "diverged_epoch": diverged_epoch,
            **vars(self.history),
            "parts": parts,
            "files": self._digest_files(used),
        }
        if not create_commit(self.folder, commit):
            raise superseded(self.folder, self.attempt, "COMMIT.json of another attempt")
        for name in self.folder.folders():
            if _is_record(name) and name not in used:
                (self.folder / name).remove()

    def _digest_files(self, parts: Collection[str]) -> dict[str, str]:
        """Return the digest of each file of a record, by its path in the folder.

        Parameters
        ----------
        parts
            The folders of the attempts that hold the record. Of these, only the files that belong
            to it count: an attempt that died may have written epochs that another trained again.
        """
        files = {
            path: digest
            for path, digest in self.history.files.items()
            if not _is_record(path) or path.partition("/")[0] in parts
        }
        for folder in (ATTEMPTS, CHECKPOINTS, ERRORS, WITHDRAWN):
            for path in (f"{folder}/{name}" for name in (self.folder / folder).walk()):
                files[path] = (
                    self._checkpoint_files.get(path)
                    or hashlib.sha256(self.folder.read_bytes(path) or b"").hexdigest()
                )
        return files

    def _require_newest(self) -> None:
        require_newest(self.folder, self.attempt)
