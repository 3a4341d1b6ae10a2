"""The files of an explorer: parts that are kept while nothing changed, and the page, written last.

A part has 12 digits of a digest of what it is made from in its name. It is kept if data/study.js,
which is written when all parts are on the disk, names it. A part with damage has the damage in its
digest: it is made again each time, so that the damage is found again, or is gone. A part that is
another script than one with data is made again too.

Map: `ExplorerFolder`, `read_application` (the page), `read_asked`, `script` (an object as a
script), `read_script`, `encode_array`.
"""

import base64
import json
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any

import numpy as np

from sampimp.errors import ConfigError, RecordError
from sampimp.schema import digest_json
from sampimp.store.json_types import parse_json, require_type
from sampimp.store.location import Folder
from sampimp.store.manifests import has_manifest, remove_manifest, write_manifest

ENCODING = 1
"""Version of the parts' content; a change renames them all."""
STUDY, PAGE_FILE = "data/study.js", "index.html"
_CALL = "sampimpData("
CHECKED: set[tuple[Folder, str]] = set()
"""Files that this process has written, or has found to hold data."""
_PART = re.compile(
    r"data/[A-Za-z0-9_-]+/(labels|names|ids|rows|sprites|shared|(run|history|influence)-.+)"
    r"-[0-9a-f]{12}(-\d{4,})?\.(js|png|jpg)"
)


def script(value: Any) -> bytes:
    r"""Return a JSON object as a classic script, in ASCII and without "<".

    Examples
    --------
    >>> script({"name": "</script>"})
    b'sampimpData({"name":"\\u003c/script>"});\n'
    """
    text = json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)
    # A "<" can only be inside of a string, where \u003c is the same character.
    return f"{_CALL}{text.replace('<', chr(92) + 'u003c')});\n".encode()


def read_script(content: bytes) -> Any:
    """Return the object of a script; None if it is not one that `script` returned."""
    try:
        text = content.removeprefix(_CALL.encode()).removesuffix(b");\n")
        value = parse_json(text, STUDY)
        json.dumps(value, allow_nan=False)  # the page reads JSON
    except (RecordError, ValueError):
        return None
    return value


def encode_array(values: np.ndarray) -> str:
    """Return an array as base64 of its little-endian bytes.

    Examples
    --------
    >>> encode_array(np.array([1, 2], np.uint16))
    'AQACAA=='
    """
    plain = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return base64.b64encode(plain.tobytes()).decode()


class ExplorerFolder:
    """The folder that an explorer is written into.

    Parameters
    ----------
    folder
        The folder.
    study
        The study whose analysis.manifest.json lists the files; None for a folder elsewhere.

    Raises
    ------
    ConfigError
        The folder has a page that is not an explorer's.
    """

    def __init__(self, folder: Folder, study: Folder | None) -> None:
        self.folder, self._study = folder, study
        self._present = set(folder.walk())
        if PAGE_FILE in self._present and STUDY not in self._present:
            raise ConfigError(
                expected="an empty folder, or one with an explorer",
                got=f"another {PAGE_FILE}",
                where=str(folder),
                todo="choose another folder with --to",
            )
        previous = read_script(folder.read_bytes(STUDY) or b"") if self._present else None
        self._entries = {_files_of(entry)[0]: entry for entry in _entries_of(previous)}
        self._durable = {file for entry in self._entries.values() for file in _files_of(entry)}
        self._durable &= self._present
        self._used: set[str] = set()
        self.changes = 0
        """Number of files that were written or removed."""

    def add(
        self,
        name: str,
        ending: str,
        basis: Any,
        make: Callable[[list[str]], tuple[dict[str, Any], bytes | Sequence[bytes]]],
        damaged: list[str],
        hint: Any = dict[str, Any],
    ) -> dict[str, Any]:
        """Write a part unless it is there, and return its entry in the manifest.

        Parameters
        ----------
        name
            Path of the part, without digest and ending.
        ending
            Ending of its files: js, png or jpg.
        basis
            What it is made from, as JSON.
        make
            Returns the entry without files, and the content of its file, or of each of its files;
            its argument gets a line for each chunk that is damaged.
        damaged
            Gets these lines.
        hint
            The type of the entry (`sampimp.store.json_types`): the part is written again if the
            manifest has none of this type.
        """
        digest = digest_json([ENCODING, basis])[:12]
        for first in (f"{name}-{digest}.{ending}", f"{name}-{digest}-0000.{ending}"):
            entry = self._entries.get(first)
            if entry is not None and self._is_kept(entry, hint):
                self._used.update(_files_of(entry))
                return entry
        damage: list[str] = []
        described, content = make(damage)
        if damage:
            damaged += damage
            digest = digest_json([ENCODING, basis, damage])[:12]
        if isinstance(content, bytes):
            files = {f"{name}-{digest}.{ending}": content}
            entry = {**described, "file": next(iter(files))}
        else:
            files = {
                f"{name}-{digest}-{page:04d}.{ending}": each for page, each in enumerate(content)
            }
            entry = {**described, "files": list(files)}
        for file, each in files.items():
            if file not in self._durable or not self._is_data(file):
                self._write(file, each, durable=False)
        self._used.update(files)
        return entry

    def _is_kept(self, entry: dict[str, Any], hint: Any) -> bool:
        """Return whether a part is on the disk and holds data, and its entry has a type."""
        try:
            require_type(entry, hint, STUDY)
        except RecordError:
            return False
        files = _files_of(entry)
        return self._durable.issuperset(files) and all(map(self._is_data, files))

    def _is_data(self, file: str) -> bool:
        """Return whether a file is an image, or a script that hands over data and does no more.

        A study of somebody else may have any script where a part should be, which the page would
        run. A file is read once in a process.
        """
        if not file.endswith(".js") or (self.folder, file) in CHECKED:
            return True
        content = self.folder.read_bytes(file) or b""
        is_call = content.startswith(_CALL.encode()) and content.endswith(b");\n")
        if not is_call or read_script(content) is None:
            return False
        CHECKED.add((self.folder, file))
        return True

    def read(self, file: str) -> Any:
        """Return the object of a part."""
        return read_script(self.folder.read_bytes(file) or b"")

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest and the page, and remove the parts that are no longer named."""
        if self.changes:
            self.folder.sync()
        pages = read_application()
        page = pages.pop(PAGE_FILE)
        for file, content in (*sorted(pages.items()), (STUDY, script(manifest)), (PAGE_FILE, page)):
            if self.folder.read_bytes(file) != content:
                self._write(file, content, durable=True)
        for file in sorted(self._present - self._used):
            if _PART.fullmatch(file):
                self._begin()
                self.folder.delete(file)
        if self._study is not None and (self.changes or not has_manifest(self._study, "analysis")):
            write_manifest(self._study, "analysis")

    def _write(self, file: str, content: bytes, *, durable: bool) -> None:
        self._begin()
        self.folder.write_bytes(file, content, durable=durable)
        CHECKED.add((self.folder, file))

    def _begin(self) -> None:
        """Note a change; before the first one, remove the list of the files."""
        if not self.changes and self._study is not None:
            remove_manifest(self._study, "analysis")
        self.changes += 1


def read_asked(folder: Folder) -> Any:
    """Return what the explorer of a folder was asked for; None if there is none."""
    manifest = read_script(folder.read_bytes(STUDY) or b"")
    return manifest.get("asked") if isinstance(manifest, dict) else None


def read_application() -> dict[str, bytes]:
    """Return the files of the page by name."""
    application = resources.files(__package__) / "application" / "dist"
    return {each.name: each.read_bytes() for each in application.iterdir()}


def _entries_of(value: Any) -> Iterator[dict[str, Any]]:
    """Yield each object of a manifest that names files."""
    if isinstance(value, dict):
        if _files_of(value):
            yield value
        for each in value.values():
            yield from _entries_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from _entries_of(each)


def _files_of(entry: dict[str, Any]) -> list[str]:
    """Return the files that an entry names."""
    files = [entry["file"]] if "file" in entry else entry.get("files")
    is_list = isinstance(files, list) and all(isinstance(file, str) for file in files)
    return list(files) if is_list and files else []
