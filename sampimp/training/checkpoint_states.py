"""Load the state in a checkpoint: no code runs, and no header allocates memory.

The digest of a checkpoint shows that its bytes are those of its manifest, and not that they are a
state of the run. Bytes that are none, or of another network, are an `UnusableCheckpointError`, and
the work continues from the checkpoint before (`sampimp.sweeps.work`).

`torch.load` with `weights_only` makes tensors and plain values only. A tensor may claim any size,
though, so the state is loaded twice: on PyTorch's device "meta", which allocates nothing, to add up
the claims, and then in earnest.

Map: `load_tensors`, `load_arrays`; `restoring`, `UnusableCheckpointError`.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sampimp.data.npz import check_headers
from sampimp.errors import RecordError


class UnusableCheckpointError(RecordError):
    """A checkpoint has its digest, and is no state of the work that it belongs to."""


@contextlib.contextmanager
def restoring(what: str) -> Iterator[None]:
    """Turn whatever fails on a state that is none into an UnusableCheckpointError.

    Parameters
    ----------
    what
        The work, for the message.
    """
    try:
        yield
    except (UnusableCheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of PyTorch, NumPy and zipfile, depending on the bytes
        raise unusable(what, str(error).partition("\n")[0] or type(error).__name__) from error


def unusable(what: str, got: str) -> UnusableCheckpointError:
    """Return the error for a state that does not belong to a piece of work."""
    return UnusableCheckpointError(
        expected=f"a state of {what}",
        got=got[:200],
        where="the state of a checkpoint, or one that is stored",
        todo="nothing: the checkpoint before is used; a stored state is made again after "
        "`sampimp status OUT --withdraw`",
    )


def load_tensors(state: bytes, device: str | torch.device) -> dict[str, Any]:
    """Return the dictionary that `torch.save` wrote, on a device; call it within `restoring`."""
    with zipfile.ZipFile(io.BytesIO(state)) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("a compressed archive, which torch.save does not write")
    if sum(member.file_size for member in members) > len(state):
        raise ValueError("members larger than the archive")
    claims: dict[int, int] = {}
    _add_claims(torch.load(io.BytesIO(state), weights_only=True, map_location="meta"), claims)
    if sum(claims.values()) > len(state):
        raise ValueError(f"tensors of {sum(claims.values()):,} bytes in {len(state):,} bytes")
    value = torch.load(io.BytesIO(state), weights_only=True, map_location=device)
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__}")
    return value


def _add_claims(value: Any, claims: dict[int, int]) -> None:
    """Add up the bytes of all tensors in a state; views share theirs."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        claims[storage._cdata] = storage.nbytes()
        claims[id(value)] = max(0, value.nbytes - storage.nbytes())
    elif isinstance(value, dict):
        for item in value.values():
            _add_claims(item, claims)
    elif isinstance(value, list | tuple):
        for item in value:
            _add_claims(item, claims)


def load_arrays(state: bytes) -> dict[str, np.ndarray]:
    """Return the arrays that `np.savez` wrote; call it within `restoring`."""
    check_headers(io.BytesIO(state), len(state))
    with np.load(io.BytesIO(state), allow_pickle=False) as file:
        return dict(file)
