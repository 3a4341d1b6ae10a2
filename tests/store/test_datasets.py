"""Stored data sets are read as they were written, or not at all."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracles
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from sampimp.errors import RecordError
from sampimp.schema import digest
from sampimp.store import disk
from sampimp.store.datasets import (
    FILE_ARRAYS,
    chunk_table,
    open_source,
    read_source,
    write_source,
)
from sampimp.store.file_names import LONGEST_NAME, decode_names, encode_names
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
    assert (again.train_files, again.test_files) == (source.train_files, source.test_files)


def test_a_data_set_without_file_names_has_none(tmp_path):
    made = oracles.make_source()
    source = dataclasses.replace(made, train_files=None, test_files=None)
    write_source(Folder.of(tmp_path), source)
    assert read_source(Folder.of(tmp_path)).train_files is None
    assert chunk_table(source) == chunk_table(made)  # as the plans of such data sets have it


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1)


@given(st.lists(names, min_size=1))
def test_file_names_round_trip(files):
    rows = encode_names(files)
    assert rows.dtype == np.uint8
    assert rows.shape[0] == len(files)
    assert decode_names(rows).tolist() == files


@pytest.mark.parametrize("name", FILE_ARRAYS)
def test_a_changed_file_name_is_found(tmp_path, name):
    write_source(Folder.of(tmp_path), oracles.make_source())
    array = zarr.open_array(str(tmp_path / name), mode="r+")
    array[3, 0] = ord("x")
    stored = open_source(Folder.of(tmp_path))
    assert [words.partition(":")[0] for words in stored.damage()] == [
        f"{name}, rows 0 to {array.shape[0] - 1}"
    ]
    with pytest.raises(RecordError, match=name):
        stored.read(name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("train_files", {"shape": [24, 0]}),
        ("train_files", {"shape": [24, LONGEST_NAME + 1]}),
        ("train_files", {"shape": [23, 20]}),
        ("test_files", {"shape": [9]}),
        ("test_files", {"dtype": "<i8"}),
        ("test_files", None),
        ("values", {}),
    ],
)
def test_a_table_of_file_names_that_does_not_fit_is_refused(tmp_path, name, change):
    write_source(Folder.of(tmp_path), oracles.make_source())
    group = zarr.open_group(str(tmp_path), mode="r+")
    tables = dict(group.attrs["files"])
    if change is None:
        del tables[name]
    else:
        tables[name] = tables.get(name, tables["train_files"]) | change
    group.attrs["files"] = tables
    with pytest.raises(RecordError, match=r"fit together|train_files, test_files|whole number"):
        open_source(Folder.of(tmp_path))


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_a_full_scale_is_a_positive_number(tmp_path, scale):
    write_source(Folder.of(tmp_path), oracles.make_source())
    content = json.loads((tmp_path / "zarr.json").read_bytes())
    content["attributes"]["chunks"]["full_scale"] = scale
    (tmp_path / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(RecordError, match="full scale that is no positive number"):
        open_source(Folder.of(tmp_path))


def test_a_table_of_file_names_replaces_no_digest_of_a_value(tmp_path):
    write_source(Folder.of(tmp_path), oracles.make_source())
    group = zarr.open_group(str(tmp_path), mode="r+")
    array = zarr.open_array(str(tmp_path / "train_labels"), mode="r+")
    array[0] += 1
    forged = group.attrs["chunks"]["arrays"]["train_labels"] | {"digests": [digest(array[:])]}
    group.attrs["files"] = {**group.attrs["files"], "train_labels": forged}
    with pytest.raises(RecordError, match="train_files, test_files"):
        open_source(Folder.of(tmp_path))


def test_a_file_name_that_is_not_utf8_is_an_error(tmp_path):
    write_source(Folder.of(tmp_path), oracles.make_source())
    array = zarr.open_array(str(tmp_path / "train_files"), mode="r+")
    array[0, 0] = 0xFF
    group = zarr.open_group(str(tmp_path), mode="r+")
    tables = group.attrs["files"]
    tables["train_files"]["digests"] = [digest(array[:])]
    group.attrs["files"] = tables
    with pytest.raises(RecordError, match="UTF-8"):
        open_source(Folder.of(tmp_path)).read("train_files")


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
