"""Stored data sets are read as they were written, or not at all."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracles
import pytest
import zarr

from sampimp.errors import RecordError
from sampimp.store import disk
from sampimp.store.datasets import read_source, write_source
from sampimp.store.location import Folder


# Data sets.
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 40, 40), (5,)])
def test_a_data_set_round_trips(tmp_path, shape):
    source = oracles.make_source(shape=shape)
    assert read_source(Folder.of(tmp_path)) is None
    write_source(Folder.of(tmp_path), source)
    again = read_source(Folder.of(tmp_path))
    assert again.digest == source.digest
    assert (again.name, again.class_names, again.full_scale) == (
        source.name,
        source.class_names,
        source.full_scale,
    )
    for name in ("train_values", "train_labels", "test_values", "test_labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(source, name))
        assert getattr(again, name).dtype == getattr(source, name).dtype


def test_writing_a_data_set_again_deletes_and_changes_nothing(tmp_path, monkeypatch):
    source = oracles.make_source(shape=(3, 40, 40), samples=12)
    write_source(Folder.of(tmp_path), source)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(root, path):
        raise AssertionError(path)

    monkeypatch.setattr(disk, "delete_file", refuse)
    monkeypatch.setattr(disk, "delete_folder", refuse)
    write_source(Folder.of(tmp_path), source)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_readers_see_a_data_set_as_a_whole_while_others_write_it(tmp_path):
    folder, source, start = Folder.of(tmp_path), oracles.make_source(), threading.Barrier(5)

    def write():
        start.wait()
        write_source(folder, source)

    def read():
        start.wait()
        while (stored := read_source(folder)) is None:
            pass
        return {stored.digest} | {read_source(folder).digest for _ in range(20)}

    with ThreadPoolExecutor(5) as pool:
        writers = [pool.submit(write) for _ in range(4)]
        reader = pool.submit(read)
        for writer in writers:
            writer.result()
        assert reader.result() == {source.digest}


def test_what_is_left_of_another_data_set_is_replaced(tmp_path):
    write_source(Folder.of(tmp_path), oracles.make_source(samples=30))
    zarr.open_group(str(tmp_path), mode="r+").attrs.clear()  # never completed
    source = oracles.make_source(samples=12, seed=1)
    write_source(Folder.of(tmp_path), source)
    assert read_source(Folder.of(tmp_path)).digest == source.digest


def test_a_data_set_written_over_another_replaces_it(tmp_path):
    write_source(Folder.of(tmp_path), oracles.make_source(samples=30))
    source = oracles.make_source(samples=12, seed=1)
    write_source(Folder.of(tmp_path), source)
    assert read_source(Folder.of(tmp_path)).digest == source.digest


@pytest.mark.parametrize("name", ["train_values", "train_labels", "test_values", "test_labels"])
def test_a_data_set_of_other_values_is_refused(tmp_path, name):
    source = oracles.make_source()
    write_source(Folder.of(tmp_path), source)
    array = zarr.open_array(str(tmp_path / name), mode="r+")
    array[0] = (array[0] + 1) % 3
    with pytest.raises(RecordError, match=rf"digest {source.digest}(.|\n)*{tmp_path}"):
        read_source(Folder.of(tmp_path))


def test_an_incomplete_data_set_is_none(tmp_path):
    write_source(Folder.of(tmp_path), oracles.make_source())
    group = zarr.open_group(str(tmp_path), mode="r+")
    del group.attrs["digest"]
    assert read_source(Folder.of(tmp_path)) is None
