"""A folder on a disk or in a bucket: bytes and JSON under one interface.

Every object is stored whole or not at all (`sampimp.store.disk`; a PUT of S3 is atomic), and by
default is durable when the call returns. Reading an absent object returns None; a folder or bucket
that cannot be reached raises `StoreError` (`sampimp.store.s3_errors`). Symbolic links out of a
local root are refused (`sampimp.store.links`).

While its server does not answer, a bucket is retried for `SERVER_PATIENCE`, then
`ServerAwayError` is raised. A `Folder` is a root and a path: it is pickled without credentials,
and each process opens the bucket for itself (`sampimp.store.buckets`).

Map: `Folder`.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, S3Store

from sampimp.data.npz import machine_memory
from sampimp.errors import StoreError
from sampimp.store import disk
from sampimp.store.buckets import (
    OPENING_PATIENCE,
    SERVER_PATIENCE,
    check_url,
    open_store,
    too_large,
)
from sampimp.store.file_types import check_file
from sampimp.store.json_types import LARGEST_JSON, parse_json
from sampimp.store.links import check_links
from sampimp.store.s3_errors import ServerAwayError, readable_errors
from sampimp.store.seals import json_bytes

if TYPE_CHECKING:
    from obstore import GetOptions

_RETRY_PATIENCE = timedelta(seconds=2)
"""How long obstore itself retries for a `Folder`: Ctrl-C is not handled meanwhile."""
_CREATION_ATTEMPTS = 100
"""How often a file is made that neither exists nor can be made: others make and delete it, or it is
a folder (arbitrary)."""
_WRITE_TEST = ".sampimp-write-test"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk or in an object store.

    Parameters
    ----------
    root
        An absolute path, or a URL such as s3://bucket/study.
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
        """Return the folder of a path, made absolute, or of a URL.

        Raises
        ------
        StoreError
            The URL is not a plain s3://bucket/prefix.
        """
        if isinstance(out, Folder):
            return out
        text = os.fspath(out)
        if "://" not in text:
            return cls(os.path.abspath(text))
        check_url(text)
        return cls(text.rstrip("/"))

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.root, str(PurePosixPath(self.path, name)))

    def __str__(self) -> str:
        return f"{self.root}/{self.path}".rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a disk of this machine."""
        return "://" not in self.root

    def read_bytes(
        self, name: str, largest: int | None = None, *, first: int | None = None
    ) -> bytes | None:
        """Return an object's content, or its `first` bytes, or None if there is none.

        Raises
        ------
        RecordError
            It has more than `largest` bytes (default: this machine's memory); they are not read.
        """
        limit = machine_memory() if largest is None else largest
        if self._is_absent:
            return None

        def get(store: LocalStore | S3Store) -> bytes:
            answer = obstore.get(store, self._key(name), options=_part(first))
            if first is None and answer.meta["size"] > limit:  # obstore would abort the process
                raise too_large(answer.meta["size"], limit, f"{self}/{name}")
            return bytes(answer.bytes())

        try:
            return self._request(get)
        except FileNotFoundError:
            return None

    def write_bytes(self, name: str, content: bytes, *, durable: bool = True) -> None:
        """Store an object; a reader sees the old content or the new one, never a part.

        Parameters
        ----------
        name
            Its path in the folder.
        content
            Its content.
        durable
            False lets a local disk write it later; `sync` waits for that.
        """
        if self.is_local:
            store_file = disk.publish if durable else disk.write
            with readable_errors(self):
                store_file(self.root, self._key(name), content)
            return
        self._request(
            lambda store: obstore.put(store, self._key(name), content, use_multipart=False)
        )

    def sync(self) -> None:
        """Make durable what was written to the folder's file system; buckets are durable."""
        if self.is_local:
            with readable_errors(self):
                disk.sync_all(self.root)

    def create_bytes(self, name: str, content: bytes) -> bool:
        """Store an object if there is none; return whether this call stored it.

        A server may store an object and fail before it answers; the repeated request then fails
        because the object exists. So the stored bytes are compared: equal bytes count as stored by
        this call. Hence `content` has to be unique to the caller (with a random token, say);
        otherwise two callers with equal bytes would both get True.

        Raises
        ------
        StoreError
            Something of this name is there that is no file.
        """
        for _ in range(_CREATION_ATTEMPTS):
            try:
                self._create(name, content)
                return True
            except (AlreadyExistsError, FileExistsError):
                stored = self.read_bytes(name)
            # None: deleted meanwhile; or S3 answered 409 to two writers and stored neither. Retry.
            if stored is not None:
                return stored == content
        raise _no_file(f"{self}/{name}")

    def _create(self, name: str, content: bytes) -> None:
        if self.is_local:
            with readable_errors(self):
                disk.publish(self.root, self._key(name), content, replace=False)
            return
        self._request(lambda store: obstore.put(store, self._key(name), content, mode="create"))

    def create_json(self, name: str, value: Any) -> bool:
        """Store a JSON value if there is none, as `create_bytes` does."""
        return self.create_bytes(name, json_bytes(value))

    def read_json(self, name: str) -> Any:
        """Return the value of a JSON file, or None if there is no such file.

        Raises
        ------
        RecordError
            The file is too large, holds no JSON, or lacks what files of its name have.
        """
        content = self.read_bytes(name, LARGEST_JSON)
        if content is None:
            return None
        value = parse_json(content, f"{self}/{name}")
        check_file(value, str(PurePosixPath(self.path, name)), f"{self}/{name}")
        return value

    def write_json(self, name: str, value: Any) -> None:
        """Store a JSON value durably."""
        self.write_bytes(name, json_bytes(value))

    def folders(self) -> list[str]:
        """Return the names of its subfolders, sorted."""
        return self._list()[0]

    def files(self) -> list[str]:
        """Return the names of its objects, sorted."""
        return self._list()[1]

    def walk(self) -> list[str]:
        """Return the paths of all objects below it, relative to it, sorted; links not followed."""
        if not self.is_local:
            return sorted(item["path"].removeprefix(self._prefix) for item in self._objects())
        check_links(self.root, self.path)
        return sorted(
            os.path.relpath(os.path.join(parent, name), str(self))
            for parent, _, names in _tree(self)
            for name in names
            if not disk.is_temporary(name)
        )

    def size(self) -> int:
        """Return the total size of its content in bytes, targets of links not counted."""
        if not self.is_local:
            return sum(item["size"] for item in self._objects())
        check_links(self.root, self.path)
        paths = (os.path.join(parent, name) for parent, _, names in _tree(self) for name in names)
        return sum(map(_size_of, paths))

    def delete(self, name: str) -> None:
        """Delete one object or link; do nothing if there is none."""
        key = self._key(name)
        _check_parents(self, key)
        with contextlib.suppress(FileNotFoundError):
            if self.is_local:
                with readable_errors(self):
                    disk.delete_file(self.root, key)
            else:
                self._request(lambda store: obstore.delete(store, key))

    def is_empty(self) -> bool:
        """Return whether the folder has no files."""
        folders, objects = self._list()
        # Ignore the write test of another process, running or killed, and folders that a power cut
        # left without their files.
        return not set(objects) - {_WRITE_TEST} and all(
            (self / name).is_empty() for name in folders
        )

    def remove(self) -> None:
        """Delete the folder with its content; links are deleted, and their targets are not.

        Raises
        ------
        StoreError
            The folder is, or contains, a link that leads out of the root: nothing is deleted.
        """
        if self.is_local:
            self._remove_tree()
            return
        paths = [item["path"] for item in self._objects()]
        with contextlib.suppress(FileNotFoundError):  # another process deletes at the same time
            self._request(lambda store: obstore.delete(store, paths))

    def _objects(self) -> list[Any]:
        """Return what a bucket states of each object below the folder."""
        pages = self._request(lambda store: list(obstore.list(store, self._prefix)))
        return [item for page in pages for item in page]

    def _remove_tree(self) -> None:
        check_links(self.root, self.path)
        _check_parents(self, self.path)
        is_link = bool(self.path) and os.path.islink(str(self))
        tree = [] if is_link else _tree(self)
        paths = [os.path.join(parent, n) for parent, inner, outer in tree for n in inner + outer]
        for path in paths:
            check_links(self.root, os.path.relpath(path, self.root))
        for path in [str(self)] if is_link else paths:
            if os.path.islink(path) or not os.path.isdir(path):
                with contextlib.suppress(FileNotFoundError), readable_errors(self):
                    disk.delete_file(self.root, path)
        for folder, _, _ in tree:
            with contextlib.suppress(OSError):  # another process deletes it, or writes into it
                disk.delete_folder(self.root, folder)

    def check_reachable(self) -> None:
        """Raise StoreError unless the bucket exists, answers and accepts the credentials.

        Other methods wait for `SERVER_PATIENCE` for a server that is away; this one, called when a
        study is opened, for `OPENING_PATIENCE`: a wrong endpoint is more likely then.
        """
        if not self.is_local:
            self._list(OPENING_PATIENCE)

    def check_writable(self) -> None:
        """Raise StoreError unless an object can be stored here; delete that object again."""
        self.write_bytes(_WRITE_TEST, bytes(2**16))  # an empty file fits on a full disk
        self.delete(_WRITE_TEST)

    def _list(self, patience: timedelta | None = None) -> tuple[list[str], list[str]]:
        """Return the names of its subfolders and of its objects, each sorted."""
        if self._is_absent:
            return [], []
        if self.is_local:
            check_links(self.root, self.path)
        listing = self._request(
            lambda store: obstore.list_with_delimiter(store, self._prefix), patience
        )
        folders = (PurePosixPath(path).name for path in listing["common_prefixes"])
        objects = (PurePosixPath(item["path"]).name for item in listing["objects"])
        return sorted(folders), sorted(objects)

    def _request(
        self, call: Callable[[LocalStore | S3Store], _T], patience: timedelta | None = None
    ) -> _T:
        """Call with the obstore store, and retry while its server is away.

        obstore itself does not retry a list, delete or conditional put. So it may happen twice.
        """
        store, start = open_store(self.root, _RETRY_PATIENCE), time.monotonic()
        patience = patience or SERVER_PATIENCE
        while True:
            try:
                with readable_errors(self):
                    return call(store)
            except ServerAwayError:
                if time.monotonic() - start > patience.total_seconds():
                    raise
                time.sleep(0.5)

    @property
    def _is_absent(self) -> bool:
        """Whether the root is a local folder that does not exist; reading does not create it."""
        return self.is_local and not Path(self.root).is_dir()

    @property
    def _prefix(self) -> str:
        return f"{self.path}/" if self.path else ""

    def _key(self, name: str) -> str:
        key = str(PurePosixPath(self.path, name))
        if self.is_local:
            check_links(self.root, key)
        return key


def _no_file(where: str) -> StoreError:
    return StoreError(
        expected="a file, or nothing of its name",
        got="something that can neither be read nor made",
        where=where,
        todo="remove it, then run the same command again",
    )


def _check_parents(folder: Folder, key: str) -> None:
    """Raise StoreError if the path of an object to be deleted passes through a link."""
    if folder.is_local:
        check_links(folder.root, str(PurePosixPath(key).parent), passable=False)


def _tree(folder: Folder) -> list[tuple[str, list[str], list[str]]]:
    """Return what `os.walk` yields of a local folder, the innermost folders first.

    A folder that cannot be listed is an error: `os.walk` alone would leave out what is in it.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # deleted meanwhile
            raise error

    with readable_errors(folder):
        return list(os.walk(str(folder), topdown=False, onerror=refuse))


def _size_of(path: str) -> int:
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
        return 0 if os.path.islink(path) else os.stat(path).st_size
    return 0


def _part(first: int | None) -> "GetOptions":
    return {} if first is None else {"range": (0, first)}
