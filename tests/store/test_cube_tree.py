"""A cube is written to Zarr with its values, and without warnings, by `to_zarr` of each form."""

import warnings

import numpy as np
import pytest
import xarray as xr
import zarr

from sampimp.analysis.example_cube import example_cube
from sampimp.store.cube_tree import DataTree


@pytest.fixture
def tree():
    cube = example_cube()
    lazy = cube.assign_coords(file=("sample", np.char.add("é", cube.sample.values.astype(str))))
    return DataTree.from_dict({"/": xr.Dataset(attrs={"title": "t"}), "mnist/cnn": lazy.chunk()})


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_same(written, expected):
    assert written.attrs == expected.attrs
    assert set(written.coords) == set(expected.coords)
    assert written.equals(expected.load())
    for name, variable in expected.variables.items():
        assert written[name].dims == variable.dims
        assert written[name].attrs == variable.attrs
        np.testing.assert_array_equal(written[name].values, variable.values)
        assert written[name].dtype == variable.dtype or variable.dtype.kind == "U"


def test_a_tree_is_written_with_its_values_and_without_warnings(tree, tmp_path):
    tree.to_zarr(tmp_path / "tree.zarr")
    again = xr.open_datatree(tmp_path / "tree.zarr", engine="zarr")
    assert again.groups == tree.groups
    assert again.attrs == {"title": "t"}
    assert_same(again["mnist/cnn"].to_dataset(), tree["mnist/cnn"].to_dataset())
    # The form that the specification of Zarr 3 has, for other libraries.
    names = zarr.open_array(tmp_path / "tree.zarr", path="mnist/cnn/layer").metadata
    assert names.to_dict()["data_type"] == "string"


def test_a_nodes_dataset_and_a_part_of_it_are_written_too(tree, tmp_path):
    node = tree["mnist/cnn"].to_dataset()
    for position, part in enumerate((node, node.isel(seed=0), node[["importance"]])):
        part.to_zarr(tmp_path / f"{position}.zarr", mode="w")
        assert_same(xr.open_zarr(tmp_path / f"{position}.zarr"), part)
