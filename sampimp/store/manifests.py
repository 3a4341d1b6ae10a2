"""Lists of files with their digests: every byte of a study has one.

| files | list |
|---|---|
| of a record (OUT/trials/ID, OUT/influence/ID) | "files" in its COMMIT.json |
| of any other folder, such as OUT/datasets/mnist.zarr | mnist.zarr.manifest.json beside it |

Both are sealed (`sampimp.store.seals`). Files that are in no list are strays: of an attempt that
came too late, for instance. They are never read.

Map: `write_manifest`, `remove_manifest`, `has_manifest`, `read_manifest_of`; `FileList` (the files
of one folder), `hash_file`, `file_damage`, `strays`.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from sampimp.errors import RecordError
from sampimp.store.file_types import FilesFile
from sampimp.store.json_types import require_type
from sampimp.store.location import Folder
from sampimp.store.seals import seal, unseal

_ENDING = ".manifest.json"


class FileList(NamedTuple):
    """The files of a folder, as they were written."""

    name: str
    """The folder, relative to the study's."""
    folder: Folder
    files: Mapping[str, str]
    """SHA-256 of each file, by its path in the folder."""
    digest: str
    """Digest of the list."""


def write_manifest(study: Folder, name: str, files: Mapping[str, str] | None = None) -> None:
    """Write the list of a folder's files beside it.

    Parameters
    ----------
    study
        The store of the study.
    name
        The folder, relative to the study's.
    files
        SHA-256 of each file, by its path in the folder; None computes them from what is stored.
    """
    folder = study / name
    if files is None:
        files = {path: hash_file(folder, path) or "" for path in folder.walk()}
    folder.sync()
    study.write_bytes(f"{name}{_ENDING}", seal({"files": dict(sorted(files.items()))}))


def remove_manifest(study: Folder, name: str) -> None:
    """Delete the list of a folder's files, before the folder is changed."""
    study.delete(f"{name}{_ENDING}")


def has_manifest(study: Folder, name: str) -> bool:
    """Return whether a folder has an undamaged list of its files."""
    try:
        return read_manifest_of(study, name) is not None
    except RecordError:
        return False


def read_manifest_of(study: Folder, name: str) -> FileList | None:
    """Return the list of a folder's files; None if it has none.

    Raises
    ------
    RecordError
        The list is not as it was written.
    """
    content = study.read_bytes(f"{name}{_ENDING}")
    if content is None:
        return None
    value = unseal(content, f"{study}/{name}{_ENDING}")
    require_type(value, FilesFile, f"{study}/{name}{_ENDING}")
    digest = hashlib.sha256(content).hexdigest()
    return FileList(name, study / name, value["files"], digest)


def hash_file(folder: Folder, path: str) -> str | None:
    """Return the SHA-256 of a file; None if there is none."""
    content = folder.read_bytes(path)
    return None if content is None else hashlib.sha256(content).hexdigest()


def file_damage(files: FileList, path: str) -> str | None:
    """Return what is wrong with a file of a list; None if nothing is."""
    actual = hash_file(files.folder, path)
    if actual == files.files[path]:
        return None
    return f"{path}: " + ("missing" if actual is None else "other bytes than were written")


def strays(files: FileList) -> list[str]:
    """Return the files of a folder that are in no list."""
    return sorted(set(files.folder.walk()) - set(files.files))
