"""Every method of a Zarr store that asks obstore: its errors are named ones, and no link leads out.

The methods are those of Zarr's interface, so that one which a later Zarr adds is tried too.
"""

import contextlib
import inspect

import pytest
from faulty_disk import FaultyDisk, faulty
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from sampimp.errors import StoreError
from sampimp.store.location import Folder
from sampimp.store.zarr_arrays import zarr_store

CONTENT = default_buffer_prototype().buffer.from_bytes(b"1")
ARGUMENTS = {
    "key": "group/key",
    "prefix": "group",
    "value": CONTENT,
    "values": [("group/key", CONTENT)],
    "prototype": default_buffer_prototype(),
    "key_ranges": [("group/key", None)],
}
ASKS_NOBODY = {"close", "open", "set_partial_values", "with_read_only"}
METHODS = sorted(
    name
    for name, method in inspect.getmembers(Store, inspect.isfunction)
    if not name.startswith("_") and name not in ASKS_NOBODY
)


async def _result_of(store, name):
    method = getattr(store, name)
    names = inspect.signature(method).parameters
    answer = method(**{name: ARGUMENTS[name] for name in names if name in ARGUMENTS})
    if inspect.isasyncgen(answer):
        return [item async for item in answer]
    return await answer


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "root" / "group").mkdir(parents=True)
    (tmp_path / "root" / "group" / "key").write_bytes(b"1")
    return Folder.of(tmp_path / "root")


@pytest.mark.parametrize("name", METHODS)
def test_any_failing_operation_is_a_store_error(name, folder, monkeypatch):
    store, counted = zarr_store(folder), FaultyDisk()
    with faulty(monkeypatch, folder.root, counted):
        sync(_result_of(store, name))
    assert counted.count
    for number in range(1, counted.count + 1):
        (folder / "group").write_bytes("key", b"1")
        faults, message = FaultyDisk(number), ""
        with faulty(monkeypatch, folder.root, faults):
            try:
                sync(_result_of(store, name))
            except StoreError as error:
                message = str(error)
        # A folder that is not removed is empty, which is no failure.
        assert "Input/output error" in message or faults.failed == "rmdir"


@pytest.mark.parametrize("name", METHODS)
def test_no_method_follows_a_link_out_of_the_root(name, folder, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "key").write_bytes(b"1")
    (tmp_path / "root" / "group" / "key").unlink()
    (tmp_path / "root" / "group").rmdir()
    (tmp_path / "root" / "group").symlink_to("../outside")
    refused = pytest.raises(StoreError, match="outside")
    with refused if name != "list" else contextlib.nullcontext():  # a walk passes links
        assert sync(_result_of(zarr_store(folder), name)) == []
    assert (tmp_path / "outside" / "key").read_bytes() == b"1"
