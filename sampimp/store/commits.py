"""The commit of a record: COMMIT.json, sealed, which makes the record visible to readers.

A commit that is damaged counts as absent: `DamageWarning` names it, and the next attempt at the
record moves it into the folder withdrawn/ and makes it again. A commit of an earlier version has
no seal; then the claim of its attempt has no entry "seals" either, so that a seal that was removed
is noticed.

Map: `read_commit`, `find_commit` (which warns instead of raising), `require_commit`,
`read_outcome` (the start of a commit);
`create_commit`, `remove_damaged_commit`, `withdraw`; `COMMIT`, `WITHDRAWN` (names).
"""

import hashlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

from sampimp.errors import DamageWarning, RecordError, StoreError
from sampimp.store.attempts import read_claim
from sampimp.store.file_types import check_file
from sampimp.store.json_types import LARGEST_JSON, parse_json
from sampimp.store.location import Folder
from sampimp.store.s3_errors import ServerAwayError
from sampimp.store.seals import DamagedFileError, is_sealed, seal, unseal

COMMIT = "COMMIT.json"
_OUTCOME_BYTES = 2**12
_LAST_OF_OUTCOME = re.compile(rb'\n "diverged_epoch": (null|\d{1,9})(?=,)')

WITHDRAWN = "withdrawn"
"""Folder of a record with the commits that count no longer."""


def read_commit(record: Folder) -> dict[str, Any] | None:
    """Return the commit of a record, or None if it is not committed.

    Parameters
    ----------
    record
        OUT/trials/ID or OUT/influence/ID.

    Raises
    ------
    DamagedFileError
        The commit is not as it was written, or lacks what readers rely on.
    RecordError
        It is too large to be read.
    """
    content = record.read_bytes(COMMIT, LARGEST_JSON)
    if content is None:
        return None
    commit = unseal(content, f"{record}/{COMMIT}", required=False)
    try:
        check_file(commit, f"{record.path}/{COMMIT}", f"{record}/{COMMIT}")
    except RecordError as error:
        raise DamagedFileError(error.expected, error.got, error.where, error.todo) from None
    attempt = commit.get("attempt")
    if (
        not is_sealed(content)
        and isinstance(attempt, int)
        and read_claim(record, attempt).get("seals")
    ):
        unseal(content, f"{record}/{COMMIT}")  # raises
    return commit


def read_outcome(record: Folder) -> dict[str, Any] | None:
    """Return what a commit says before its digests, from identity to `diverged_epoch`.

    These are its first 4 kB of about 40. Its seal is not compared, so that damage further down is
    not noticed; `digests` and `curves` are empty.

    Raises
    ------
    RecordError
        As for `read_commit`.
    """
    try:
        start = record.read_bytes(COMMIT, first=_OUTCOME_BYTES)
        last = _LAST_OF_OUTCOME.search(start or b"")
        if start is not None and last is not None:
            outcome = parse_json(start[: last.end()] + b"\n}", f"{record}/{COMMIT}")
            outcome |= {"parts": [[0, "record.zarr"]], "digests": {}, "curves": {}}
            check_file(outcome, f"{record.path}/{COMMIT}", f"{record}/{COMMIT}")
            return outcome
    except ServerAwayError:
        raise
    except (RecordError, StoreError):  # S3 refuses a part of an empty object
        pass
    return read_commit(record)


def find_commit(record: Folder) -> dict[str, Any] | None:
    """Return the commit of a record; None, with a DamageWarning, if it is damaged."""
    try:
        return read_commit(record)
    except DamagedFileError as error:
        warnings.warn(
            f"{error.where} is damaged, so that its record counts as missing: {error.got}",
            DamageWarning,
            stacklevel=2,
        )
        return None


def require_commit(record: Folder) -> dict[str, Any]:
    """Return the commit of a record that another process found committed.

    Raises
    ------
    RecordError
        It was withdrawn or damaged meanwhile.
    """
    commit = read_commit(record)
    if commit is None:
        raise RecordError(
            expected="a committed record",
            got=f"no {COMMIT}",
            where=str(record),
            todo="run the command that wrote it again, then this command",
        )
    return commit


def create_commit(record: Folder, commit: Mapping[str, Any]) -> bool:
    """Commit a record durably; return False if another attempt has committed it."""
    return record.create_bytes(COMMIT, seal(commit))


def remove_damaged_commit(record: Folder) -> None:
    """Move a damaged commit into the folder withdrawn/."""
    try:
        read_commit(record)
    except DamagedFileError:
        content = record.read_bytes(COMMIT) or b""
        name = f"damaged-{hashlib.sha256(content).hexdigest()[:8]}.json"
        record.write_bytes(f"{WITHDRAWN}/{name}", content)
        record.delete(COMMIT)


def withdraw(record: Folder) -> None:
    """Withdraw a commit: the record is then missing in the cube, and made again.

    The commit is kept as withdrawn/NNNN.json, and the next attempt writes a record of its own.
    """
    commit, content = require_commit(record), record.read_bytes(COMMIT)
    assert content is not None
    record.write_bytes(f"{WITHDRAWN}/{commit['attempt']:04d}.json", content)
    record.delete(COMMIT)
