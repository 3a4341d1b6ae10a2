"""A disk that loses power: record what `sampimp.store.disk` does, and cut that off anywhere.

Model: a file's content is durable after its fsync, a folder's entries after the folder's fsync, and
everything after a syncfs. After a cut, each change of an entry since then may have survived or not,
independently of all others, and a file that was not synced is empty, a prefix, zeros or whole. A
journalling file system is kinder; nothing that survives this model relies on that.

Map: `recorded` (a context), `SimulatedDisk` (`survivors` is a state after a cut).
"""

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sampimp.store import disk


class Operation(NamedTuple):
    """One operation on a disk, or a mark that a test sets."""

    kind: str
    path: str = ""
    other: Any = None
    """Second path, content, or what is marked."""


class RecordingOs:
    """The functions of `os` that change a disk, recorded; all others as they are."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.missed: set[str] = set()
        """Files that were deleted, or did not exist."""
        self._paths: dict[int, str] = {}
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def mark(self, what: Any) -> None:
        self._note("mark", other=what)

    def _note(self, kind: str, path: str = "", other: Any = None) -> None:
        with self._lock:
            self.operations.append(Operation(kind, os.path.normpath(path), other))

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = path
        if flags & os.O_CREAT:
            self._note("create", path)
        return descriptor

    def close(self, descriptor: int) -> None:
        del self._paths[descriptor]
        os.close(descriptor)

    def write(self, descriptor: int, content: memoryview) -> int:
        count = os.write(descriptor, content)
        self._note("write", self._paths[descriptor], bytes(content[:count]))
        return count

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        self._note("fsync", self._paths[descriptor])

    def syncfs(self, function: Any, descriptor: int) -> None:
        self._note("syncfs")

    def mkdir(self, path: str) -> None:
        os.mkdir(path)
        self._note("mkdir", path)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)
        self._note("replace", source, os.path.normpath(target))

    def link(self, source: str, target: str) -> None:
        os.link(source, target)
        self._note("link", source, os.path.normpath(target))

    def unlink(self, path: str) -> None:
        self.missed.add(os.path.normpath(path))
        os.unlink(path)
        self._note("unlink", path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)
        self._note("unlink", path)


@contextlib.contextmanager
def recorded(monkeypatch: Any) -> Iterator[RecordingOs]:
    """Record what `sampimp.store.disk` does inside the block."""
    recording = RecordingOs()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "os", recording)
        patch.setattr(disk, "_call_syncfs", recording.syncfs)
        yield recording


@dataclass
class File:
    content: bytes = b""
    durable: bytes | None = None

    def sync(self) -> None:
        self.durable = self.content

    def surviving(self, chance: random.Random) -> bytes:
        if self.durable == self.content:
            return self.content
        whole = self.content
        prefix = whole[: chance.randrange(len(whole) + 1)]
        return chance.choice([self.durable or b"", b"", prefix, bytes(len(whole)), whole])


@dataclass
class Directory:
    entries: dict[str, "File | Directory"] = field(default_factory=dict)
    durable: dict[str, "File | Directory"] = field(default_factory=dict)
    pending: list[tuple[str, "File | Directory | None"]] = field(default_factory=list)

    def set(self, name: str, node: "File | Directory | None") -> None:
        self.pending.append((name, node))
        _set(self.entries, name, node)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.entries), []

    def surviving(self, chance: random.Random) -> dict[str, "File | Directory"]:
        entries, keeps = dict(self.durable), chance.random()
        for name, node in self.pending:
            if chance.random() < keeps:
                _set(entries, name, node)
        return entries


def _set(entries: dict[str, Any], name: str, node: Any) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


class SimulatedDisk:
    """The state of a disk after recorded operations.

    Parameters
    ----------
    root
        A folder that existed before; operations elsewhere are an error.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._top = root, Directory()

    def apply(self, operation: Operation) -> None:
        """Perform a recorded operation."""
        kind, path, other = operation
        if kind == "syncfs":
            self._sync_all(self._top)
        elif kind == "fsync":
            self._node(path).sync()
        elif kind in ("create", "mkdir"):
            self._set(path, File() if kind == "create" else Directory())
        elif kind == "write":
            self._node(path).content += other
        elif kind in ("replace", "link"):
            self._set(other, self._node(path))
            if kind == "replace":
                self._set(path, None)
        elif kind == "unlink":
            self._set(path, None)

    def survivors(self, folder: Path, chance: random.Random) -> None:
        """Write what a power cut leaves now into a folder."""
        self._leave(self._top, folder, chance)

    def _leave(self, directory: Directory, folder: Path, chance: random.Random) -> None:
        folder.mkdir(exist_ok=True)
        for name, node in directory.surviving(chance).items():
            if isinstance(node, Directory):
                self._leave(node, folder / name, chance)
            else:
                (folder / name).write_bytes(node.surviving(chance))

    def _parts(self, path: str) -> tuple[str, ...]:
        return Path(path).relative_to(self._root).parts

    def _node(self, path: str) -> Any:
        node: Any = self._top
        for part in self._parts(path):
            node = node.entries[part]
        return node

    def _set(self, path: str, node: Any) -> None:
        *above, name = self._parts(path)
        self._node(str(self._root.joinpath(*above))).set(name, node)

    def _sync_all(self, node: Any) -> None:
        node.sync()
        for inner in node.entries.values() if isinstance(node, Directory) else ():
            self._sync_all(inner)
