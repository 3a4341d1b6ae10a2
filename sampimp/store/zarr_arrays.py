"""Zarr groups and arrays of a study: the only module that imports zarr.

`zarr_store` puts Zarr on the folder or bucket of a `Folder`, with its readable errors, its rule on
symbolic links and its single-request puts. The rest of the store calls the functions below and
handles arrays by slicing only.

A stored array is compared with the form that its reader expects before Zarr has its metadata, and
a chunk's size before it is decoded (`sampimp.store.array_forms`).

Map: `zarr_store` (a folder as a Zarr store, for xarray too), `open_array`,
`open_uncached` and `open_for_writing` (an array), `require_group`, `require_array` and
`write_array` (making them), `first_line` (the text of a Zarr error).
"""

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import ObjectStore, StorePath

from sampimp.errors import RecordError, UserError
from sampimp.schema import RecordLayout, variable
from sampimp.store import disk
from sampimp.store.array_forms import LARGEST_CHUNK, ArrayForm, check_chunk
from sampimp.store.buckets import get_whole, local_root, open_store, put_whole
from sampimp.store.json_types import LARGEST_JSON
from sampimp.store.links import check_links
from sampimp.store.location import Folder
from sampimp.store.s3_errors import readable_errors


class _FolderStore(ObjectStore):
    """A Zarr store on a folder or bucket, with the errors and the link check of `Folder`.

    `form` is that of the only array that is read through the store, once it is known.
    """

    form: ArrayForm | None = None
    is_compressed = False

    note: Callable[[str, Any], None] | None = None
    """Called with the key and the bytes of each object that was stored."""

    def _check(self, key: str) -> None:
        if (root := local_root(self.store)) is not None:
            check_links(root, key)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self._check(key)
        with readable_errors(f"{key} of {self.store}"):
            if byte_range is not None:
                return await super().get(key, prototype, byte_range)
            try:
                content = await get_whole(self.store, key, self._largest(key))
            except FileNotFoundError:
                return None
        if self.form is not None and self.is_compressed:
            check_chunk(content, self.form, f"{key} of {self.store}")
        return prototype.buffer.from_bytes(content)

    def _largest(self, key: str) -> int:
        """Return the largest size of an object that is read whole."""
        if key.endswith("zarr.json"):
            return LARGEST_JSON
        size = LARGEST_CHUNK if self.form is None else self.form.chunk_bytes
        return size + size // 128 + 1024  # zstd's bound for what it cannot compress

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        ranges = list(key_ranges)
        for key, _ in ranges:
            self._check(key)
        with readable_errors(self.store):
            return await super().get_partial_values(prototype, ranges)

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        self._check(key)
        with readable_errors(f"{key} of {self.store}"):
            content = memoryview(value.as_buffer_like())
            if (root := local_root(self.store)) is not None:
                await asyncio.to_thread(disk.write, root, key, content)
            else:
                await put_whole(self.store, key, content)
        if self.note is not None:
            self.note(key, content)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        # Zarr calls this for the groups above an array, which exist. obstore retries a get when a
        # server fails, but not a conditional put.
        if await self.get(key, default_buffer_prototype()) is None:
            await self.set(key, value)

    async def delete(self, key: str) -> None:
        self._check(key)
        with readable_errors(f"{key} of {self.store}"):
            if (root := local_root(self.store)) is not None:
                check_links(root, os.path.dirname(key), passable=False)
                with contextlib.suppress(FileNotFoundError):
                    disk.delete_file(root, key)
            else:
                await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        if (root := local_root(self.store)) is not None:
            (Folder(root) / prefix).remove()
            return
        with readable_errors(f"{prefix} of {self.store}"):
            await super().delete_dir(prefix)

    async def exists(self, key: str) -> bool:
        self._check(key)
        with readable_errors(f"{key} of {self.store}"):
            return await super().exists(key)

    async def getsize(self, key: str) -> int:
        self._check(key)
        with readable_errors(f"{key} of {self.store}"):
            return await super().getsize(key)

    async def getsize_prefix(self, prefix: str) -> int:
        return await Store.getsize_prefix(self, prefix)  # by the methods of this class

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        if (root := local_root(self.store)) is not None:  # obstore would list what links lead to
            paths = [os.path.join(prefix, path) for path in (Folder(root) / prefix).walk()]
        else:
            with readable_errors(f"{prefix} of {self.store}"):
                paths = [path async for path in super().list_prefix(prefix)]
        for path in paths:
            yield path

    def list(self) -> AsyncGenerator[str, None]:
        return self.list_prefix("")

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        self._check(prefix)
        with readable_errors(f"{prefix} of {self.store}"):
            names = [name async for name in super().list_dir(prefix)]
        for name in names:
            yield name


class _OverwritingStore(_FolderStore):
    """A store in which Zarr finds nothing, so that it deletes and keeps nothing."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return None

    async def exists(self, key: str) -> bool:
        return False

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        return  # the groups above an array

    async def delete(self, key: str) -> None:
        return

    async def delete_dir(self, prefix: str) -> None:
        return


def zarr_store(folder: Folder, note: Callable[[str, Any], None] | None = None) -> ObjectStore:
    """Return a folder as a Zarr store, for `xarray.open_zarr` and `Dataset.to_zarr` too.

    Parameters
    ----------
    folder
        The folder; on a local disk, what is written is durable after its `sync`.
    note
        Called with the key and the bytes of each object that was stored.
    """
    if folder.is_local:
        check_links(folder.root, folder.path)
    store = _FolderStore(open_store(str(folder)))
    store.note = note
    return store


@functools.lru_cache(maxsize=4096)
def open_array(root: str, path: str, form: ArrayForm | None = None) -> zarr.Array:
    """Open an array below a root for reading; it stays open in this process.

    Raises
    ------
    RecordError
        It is not of the form, or is no array that this package writes.
    """
    return open_uncached(Folder(root), path, form)


def open_uncached(folder: Folder, name: str, form: ArrayForm | None = None) -> zarr.Array:
    """Open an array of a folder for reading, as it is stored now; otherwise as `open_array`."""
    metadata = (folder / name).read_json("zarr.json")
    where = f"{folder}/{name}/zarr.json"
    if form is None:
        form = ArrayForm.of(metadata, where)
    else:
        form.check(metadata, where)
    store = _FolderStore(open_store(folder.root), read_only=True)
    store.form, store.is_compressed = form, len(metadata["codecs"]) > 1
    try:
        array = zarr.Array.from_dict(StorePath(store, (folder / name).path), metadata)
    except (ValueError, TypeError, KeyError) as error:  # of Zarr, for entries that are not checked
        raise RecordError(
            expected="an array of Zarr 3",
            got=first_line(error),
            where=where,
            todo="restore it from a copy, or delete it and run the command that wrote it again",
        ) from None
    return array


def open_for_writing(folder: Folder, name: str) -> zarr.Array:
    """Open an existing array, to write into it and to read it back."""
    return zarr.open_array(zarr_store(folder), path=name, mode="r+", zarr_format=3)


def require_group(folder: Folder, note: Callable[[str, Any], None] | None = None) -> zarr.Group:
    """Open a group for writing; create it if it is missing, also while another process does.

    `note` is as for `zarr_store`.
    """
    store = zarr_store(folder, note)
    try:
        return zarr.open_group(store, mode="a", zarr_format=3)
    except ContainsGroupError:
        return zarr.open_group(store, mode="r+", zarr_format=3)


def write_array(
    folder: Folder,
    name: str,
    values: np.ndarray,
    chunks: tuple[int, ...],
    attributes: Mapping[str, Any],
    note: Callable[[str, Any], None],
) -> None:
    """Write a whole array as if nothing existed; each object replaces an older one in one step.

    Several processes may write the same array at once, while others read it: all write the same
    bytes to the same keys, and none deletes any. What a power cut left of an array is replaced.

    Parameters
    ----------
    folder
        The group of the array, which is not made.
    name, values, chunks, attributes
        The array.
    note
        As for `zarr_store`.
    """
    store = _OverwritingStore(open_store(str(folder)))
    store.note = note
    array = zarr.create_array(
        store,
        name=name,
        shape=values.shape,
        chunks=chunks,
        dtype=values.dtype,
        attributes=dict(attributes),
        config={"write_empty_chunks": True},
        zarr_format=3,
    )
    array[:] = values


def require_array(group: zarr.Group, name: str, layout: RecordLayout) -> zarr.Array:
    """Open a variable of a record for writing, made if it does not exist.

    Parameters
    ----------
    group
        The record.
    name
        Name of the variable, as in `sampimp.schema`.
    layout
        Its shape and chunks.
    """
    described = variable(name)
    if name not in group:
        with contextlib.suppress(ContainsArrayError):  # made meanwhile, see `write_snapshot`
            group.create_array(
                name,
                shape=layout.shape(name),
                chunks=layout.chunk(name),
                dtype=described.dtype,
                fill_value=False if described.dtype == "bool" else np.nan,
                dimension_names=described.dims,
                attributes={"units": described.units, "long_name": described.long_name},
                # Parameters are noise to a compressor: zstd saved 8 % and took four times as long.
                compressors=None if name == "parameters" else "auto",
            )
    array = group[name]
    assert isinstance(array, zarr.Array)
    # By default Zarr omits a chunk that is all NaN, as after divergence: it would look like
    # a lost chunk, and would be read with another NaN pattern than its digest has.
    return array.with_config({"write_empty_chunks": True})


def first_line(error: Exception) -> str:
    """Return the first line of an error of Zarr or of a codec, or the error's type."""
    if isinstance(error, UserError):
        return error.summary
    return str(error).partition("\n")[0] or type(error).__name__
