"""Sealed JSON: a file that shows by itself whether it is as it was written.

The last entry of a sealed file, "seal", is the SHA-256 of the bytes of the file without that entry.
So any changed byte is found, even where the values are equal. A seal finds accidents. Whoever edits
a file on purpose can seal it again; the root of a study (`sampimp status --verify --root`) finds
that.

Map: `json_bytes` (JSON as it is stored), `seal`, `unseal`, `is_sealed`; `DamagedFileError`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from sampimp.errors import RecordError
from sampimp.store.json_types import parse_json

_SEAL = "seal"

_LAST_ENTRY = re.compile(rb'(?P<others>,?)\n "seal": "(?P<digest>[0-9a-f]{64})"\n\}\Z')


class DamagedFileError(RecordError):
    """A JSON file is truncated, is no JSON, or differs from what was sealed."""


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON, as the store has it."""
    return json.dumps(value, indent=1).encode()


def seal(value: Mapping[str, Any]) -> bytes:
    """Return the content of a sealed file.

    Examples
    --------
    >>> unseal(seal({"epochs": 50}), "COMMIT.json")
    {'epochs': 50}
    """
    return json_bytes({**value, _SEAL: hashlib.sha256(json_bytes(value)).hexdigest()})


def is_sealed(content: bytes) -> bool:
    """Return whether the content of a file ends with a seal, sound or not."""
    return f'"{_SEAL}":'.encode() in content[-100:]


def unseal(content: bytes, where: str, *, required: bool = True) -> dict[str, Any]:
    """Return the value of a sealed file, without its seal.

    Parameters
    ----------
    content
        The bytes of the file.
    where
        The file, for the message.
    required
        False also accepts a file without a seal, of a study that an earlier version wrote.

    Raises
    ------
    DamagedFileError
        The content is not a JSON object, or is not what was sealed.
    """
    try:
        value = parse_json(content, where)
    except RecordError as error:
        raise _damaged(error.got, where) from None
    if not isinstance(value, dict):
        raise _damaged(f"a JSON {type(value).__name__}", where)
    if _SEAL not in value and not required:
        return value
    stored = value.pop(_SEAL, None)
    if stored is None:
        raise _damaged("no seal", where)
    if not _is_intact(content):
        raise _damaged("other content than was sealed", where)
    return value


def _is_intact(content: bytes) -> bool:
    end = _LAST_ENTRY.search(content, max(0, len(content) - 100))
    if end is None:
        return False
    rest = content[: end.start()] + (b"\n}" if end["others"] else b"}")
    return hashlib.sha256(rest).hexdigest().encode() == end["digest"]


def _damaged(got: str, where: str) -> DamagedFileError:
    return DamagedFileError(
        expected="a file of this study as it was written",
        got=got,
        where=where,
        todo="run the command that wrote it again: it sets this file aside and repeats its work",
    )
