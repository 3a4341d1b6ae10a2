"""Stored data sets are read as they were written, or not at all."""

import numpy as np
import oracles
import pytest
import zarr

from sampimp.errors import RecordError
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
