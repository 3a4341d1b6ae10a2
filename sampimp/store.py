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

Map: `Folder` (bytes and JSON anywhere), `TrialRecord` (one trial's writer), `write_source` and
`read_source` (data sets), `read_chunk` (for readers).
"""

import configparser
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import obstore
import zarr
from obstore.store import LocalStore, S3Store
from zarr.storage import ObjectStore

from sampimp.data import Source
from sampimp.errors import RecordError, StoreError
from sampimp.schema import CURVES, VARIABLES, EpochRecord, chunk_shape, digest

if TYPE_CHECKING:
    from obstore.store import S3Config

KEPT_CHECKPOINTS = 2
"""The newest, and the one before in case the newest was cut off while it was written."""


@dataclass(frozen=True)
class Folder:
    """A folder of a local disk or of an object store.

    Parameters
    ----------
    root
        An absolute path, or an URL such as s3://bucket/study.
    path
        Relative to the root, with slashes.

    Examples
    --------
    >>> import tempfile
    >>> folder = Folder(tempfile.mkdtemp()) / "trials"
    >>> folder.write_json("trial.json", {"seed": 3})
    >>> folder.read_json("trial.json"), folder.read_json("absent.json")
    ({'seed': 3}, None)
    """

    root: str
    path: str = ""

    @classmethod
    def of(cls, out: "str | os.PathLike[str] | Folder") -> "Folder":
        """Return the folder of a path, made absolute, or of an URL."""
        if isinstance(out, Folder):
            return out
        text = os.fspath(out)
        return cls(text.rstrip("/") if "://" in text else os.path.abspath(text))

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.root, str(PurePosixPath(self.path, name)))

    def __str__(self) -> str:
        return f"{self.root}/{self.path}".rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine."""
        return "://" not in self.root

    def read_bytes(self, name: str) -> bytes | None:
        """Return an object's content, or None if there is none."""
        if self._is_absent:
            return None
        try:
            return bytes(obstore.get(_open_store(self.root), self._key(name)).bytes())
        except FileNotFoundError:
            return None

    def write_bytes(self, name: str, content: bytes) -> None:
        """Put an object whole; a reader sees the old one or the new one."""
        obstore.put(_open_store(self.root), self._key(name), content)

    def read_json(self, name: str) -> Any:
        """Return what a JSON object holds, or None if there is none.

        Raises
        ------
        RecordError
            It is there and is not JSON.
        """
        content = self.read_bytes(name)
        if content is None:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise RecordError(
                expected="a JSON file",
                got=f"{len(content)} bytes: {error}",
                where=f"{self}/{name}",
                todo="delete this file if you know what damaged it, then run the command again",
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        """Put a value that JSON can hold."""
        self.write_bytes(name, json.dumps(value, indent=1).encode())

    def folders(self) -> list[str]:
        """Return the names of the folders in it, sorted."""
        if self._is_absent:
            return []
        prefix = f"{self.path}/" if self.path else ""
        listed = obstore.list_with_delimiter(_open_store(self.root), prefix)
        return sorted(PurePosixPath(path).name for path in listed["common_prefixes"])

    def is_empty(self) -> bool:
        """Return whether nothing is in it."""
        if self._is_absent:
            return True
        prefix = f"{self.path}/" if self.path else ""
        listed = obstore.list_with_delimiter(_open_store(self.root), prefix)
        return not listed["common_prefixes"] and not listed["objects"]

    def remove(self) -> None:
        """Delete everything in it."""
        store = _open_store(self.root)
        for page in obstore.list(store, f"{self.path}/"):
            obstore.delete(store, [item["path"] for item in page])
        if self.is_local:
            shutil.rmtree(str(self), ignore_errors=True)  # the empty folders that are left

    def zarr(self) -> ObjectStore:
        """Return it as a Zarr store."""
        return ObjectStore(_open_store(str(self)))

    def check_writable(self) -> None:
        """Raise StoreError unless an object can be put here, and delete it again."""
        name = ".sampimp-write-test"
        try:
            self.write_bytes(name, b"")
            obstore.delete(_open_store(self.root), self._key(name))
        except StoreError:
            raise
        except Exception as error:  # obstore's own, OSError or PermissionError, by store and kind
            raise StoreError(
                expected="a folder or bucket that can be written",
                got=str(error).split("\n")[0],
                where=str(self),
                todo="check the path, its permissions and, for s3://, bucket and credentials",
            ) from None

    @property
    def _is_absent(self) -> bool:
        """Whether its root is a local folder that is not there; to read does not make it."""
        return self.is_local and not Path(self.root).is_dir()

    def _key(self, name: str) -> str:
        return str(PurePosixPath(self.path, name))


@functools.lru_cache(maxsize=512)
def _open_store(url: str) -> LocalStore | S3Store:
    if "://" not in url:
        try:
            return LocalStore(url, mkdir=True)
        except Exception as error:  # obstore raises its GenericError for a file in the way
            raise StoreError(
                expected="a folder, or a place where one can be made",
                got=str(error).split("\n")[0],
                where=url,
                todo="choose another --out or mend its permissions",
            ) from None
    if not url.startswith("s3://"):
        raise StoreError(
            expected="a folder or an s3:// URL",
            got=url.split("://")[0] + "://",
            where=url,
            todo="write --out as a path, or as s3://bucket/prefix",
        )
    return S3Store.from_url(url, config=_s3_credentials(url))


def _s3_credentials(url: str) -> "S3Config":
    """Return what obstore does not find on its own, the profile files; refuse if there is nothing.

    obstore reads the environment and asks the instance's own service. That service answers on AWS
    only: elsewhere the question hangs for minutes, so it is not asked without a sign of AWS.
    """
    on_aws = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_WEB_IDENTITY_TOKEN_FILE")
    if os.environ.get("AWS_ACCESS_KEY_ID") or any(map(os.environ.get, on_aws)):
        return {}
    profile = os.environ.get("AWS_PROFILE", "default")
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    parser = configparser.ConfigParser()
    parser.read(file)
    if parser.has_option(profile, "aws_access_key_id"):
        names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
        found = {name: parser[profile][name] for name in names if name in parser[profile]}
        return cast("S3Config", found)
    vendor = Path("/sys/class/dmi/id/sys_vendor")
    if vendor.is_file() and vendor.read_text().startswith("Amazon EC2"):
        return {}
    raise StoreError(
        expected="credentials for an s3:// URL",
        got=f"none in the environment, none for profile {profile!r} in {file}",
        where=url,
        todo="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write them into that file",
    )


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
        group = zarr.open_group((folder / "record.zarr").zarr(), mode="a", zarr_format=3)
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
    group = zarr.open_group((trial / "record.zarr").zarr(), mode="a", zarr_format=3)
    _require_array(group, name, sizes)[position] = values
    return digest(values)


@functools.lru_cache(maxsize=4096)
def open_array(root: str, path: str) -> zarr.Array:
    """Open an array of a study for reading."""
    return zarr.open_array(ObjectStore(_open_store(root)), path=path, mode="r", zarr_format=3)


def write_source(folder: Folder, source: Source) -> None:
    """Store a data set: its values before scaling, and its labels."""
    group = zarr.open_group(folder.zarr(), mode="w", zarr_format=3)
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
    group = zarr.open_group(folder.zarr(), mode="r", zarr_format=3)
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
