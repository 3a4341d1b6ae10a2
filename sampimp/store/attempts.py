"""Attempts at a trial: who may write, and what happens to a late writer.

A worker that was cut off by the network, and a second worker started in its place, may train the
same trial at the same time. Every attempt therefore

1. claims a number that no other attempt has (`claim_attempt` creates attempts/NNNN.json, which only
   one process can create),
2. writes into a separate record (record.zarr, record-2.zarr, ...) and separate checkpoints, so that
   a late writer overwrites nothing,
3. checks before it writes an epoch, and before the commit, that no higher number has been claimed
   (`require_newest`). **A late writer finds one and gets a `SupersededError`**;
   `sampimp.sweeps.trial` then ends it without a failure, and the newer attempt continues from the
   newest checkpoint,
4. creates COMMIT.json, which only one attempt can, even if two pass the check at the same time; the
   other one gets a `SupersededError`. The commit names the record of every epoch. Other records are
   never read.

Two drivers must not take a trial from each other. So a driver's worker begins an attempt only if
nothing has changed since its driver looked (`Trace`), and then claims exactly the next number. Of
two that look at the same time one claims it, and the other goes on to another trial.

Map: `claim_attempt`, `read_claim`, `require_newest`, `superseded`, `SupersededError`; `Trace`,
`read_trace`, `has_failed` (is a trial still attempted?); `read_manifest` (of a checkpoint),
`last_sign` (traces of a trial in words); `ATTEMPTS`, `CHECKPOINTS` and `ERRORS` (folders of a
trial), `MANIFEST`.
"""

import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from sampimp.errors import RecordError
from sampimp.store.file_types import check_file
from sampimp.store.json_types import LARGEST_JSON
from sampimp.store.location import Folder
from sampimp.store.seals import unseal

ATTEMPTS, CHECKPOINTS, ERRORS = "attempts", "checkpoints", "errors"
"""Folders of a trial."""

MANIFEST = "MANIFEST.json"
"""File of a checkpoint, sealed and written last."""


class SupersededError(RecordError):
    """A newer attempt at the trial has begun or has committed, so this one must stop."""


class Trace(NamedTuple):
    """How far the attempts at a trial have come; it changes as long as one of them goes on."""

    attempt: int = 0
    """Number of the newest attempt; 0 if there is none."""
    checkpoint: str = ""
    """Folder of the newest checkpoint; empty if there is none."""


def read_trace(trial: Folder) -> Trace:
    """Return how far the attempts at a trial have come."""
    checkpoints = (trial / CHECKPOINTS).folders()
    return Trace(max(_attempt_numbers(trial), default=0), max(checkpoints, default=""))


def has_failed(trial: Folder, attempt: int) -> bool:
    """Return whether an attempt has stored an error."""
    return trial.read_bytes(_error_name(attempt)) is not None


def claim_attempt(trial: Folder, seen: Trace | None = None) -> int:
    """Begin an attempt at a trial; return its number, which no other attempt has.

    Parameters
    ----------
    trial
        The folder of the trial.
    seen
        What the driver has seen of other attempts; None to supersede whatever there is.

    Raises
    ------
    SupersededError
        Another attempt has begun, gone on or committed since `seen`; none was begun here.
    """
    found = read_trace(trial)
    number = found.attempt + 1
    if seen is not None and (found != seen or trial.read_bytes("COMMIT.json") is not None):
        raise superseded(trial, number, f"{found.attempt} attempts, of which one goes on")
    claim = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "token": secrets.token_hex(8),
        "seals": True,
    }
    while not trial.create_json(_attempt_name(number), claim):
        if seen is not None:
            raise superseded(trial, number, "the same attempt by another driver")
        number += 1
    return number


def read_claim(trial: Folder, number: int) -> dict[str, Any]:
    """Return what an attempt stored when it began; empty if there is no such attempt."""
    return trial.read_json(_attempt_name(number)) or {}


def read_manifest(checkpoint: Folder) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint; None if there is none, or if it is damaged."""
    try:
        content = checkpoint.read_bytes(MANIFEST, LARGEST_JSON)
        if content is None:
            return None
        manifest = unseal(content, f"{checkpoint}/{MANIFEST}", required=False)
        check_file(manifest, MANIFEST, f"{checkpoint}/{MANIFEST}")
    except RecordError:
        return None
    return manifest


def require_newest(trial: Folder, attempt: int) -> None:
    """Raise SupersededError if a newer attempt at the trial has begun."""
    newer = _attempt_name(attempt + 1)
    if trial.read_bytes(newer) is not None:
        raise superseded(trial, attempt, newer)


def superseded(trial: Folder, attempt: int, newer: str) -> SupersededError:
    """Return the error for an attempt that must stop; `newer` names the file that says so."""
    return SupersededError(
        expected=f"attempt {attempt} to be the newest at this trial",
        got=newer,
        where=str(trial),
        todo="nothing: the other attempt goes on from the newest checkpoint",
    )


def _attempt_name(number: int) -> str:
    return f"{ATTEMPTS}/{number:04d}.json"


def _attempt_numbers(trial: Folder) -> list[int]:
    names = (re.fullmatch(r"(\d{4,9})\.json", name) for name in (trial / ATTEMPTS).files())
    return [int(name[1]) for name in names if name]


def _error_name(number: int) -> str:
    return f"{ERRORS}/{number:04d}.json"


@dataclass(frozen=True)
class LastSign:
    """The most recent traces of a trial's attempts in the store."""

    attempt: int
    host: str
    epoch: int
    """Epoch of the newest checkpoint; 0 if there is none."""
    time: float
    """Time of the newest checkpoint or, if later, of the attempt's beginning or failure."""
    epoch_seconds: float
    """Mean duration of an epoch in seconds; 0 if none is known."""
    error: str | None
    """How the newest attempt failed; None if it did not."""


def last_sign(trial: Folder) -> LastSign | None:
    """Return the newest attempt and checkpoint of a trial, or None if it was never begun.

    Raises
    ------
    RecordError
        The file of the attempt, or of its failure, cannot be read.
    """
    attempt = max(_attempt_numbers(trial), default=0)
    begun = trial.read_json(_attempt_name(attempt))
    if begun is None:
        return None
    failure = trial.read_json(f"{ERRORS}/{attempt:04d}.json")
    manifest = None
    for name in reversed((trial / CHECKPOINTS).folders()):
        manifest = read_manifest(trial / CHECKPOINTS / name)
        if manifest is not None:
            break
    seconds = manifest["history"]["seconds"] if manifest else []
    return LastSign(
        attempt=attempt,
        host=begun["host"],
        epoch=manifest["epoch"] if manifest else 0,
        time=max(entry["time"] for entry in (begun, failure, manifest) if entry),
        epoch_seconds=sum(seconds) / len(seconds) if seconds else 0.0,
        error=failure["error"] if failure else None,
    )
