"""The tree and the datasets that `open_cube` returns: xarray's own, written to Zarr as text.

xarray's `to_zarr` warns of two things that its caller did not choose. It writes text of fixed width
(`<U7`) in a form that the specification of Zarr 3 does not have, and that other libraries cannot
read: these classes write text of any length, which reads back as the same values. And it writes
consolidated metadata by default, which that specification does not have either.

Map: `DataTree`, `CubeDataset`.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr


class CubeDataset(xr.Dataset):
    """xarray's Dataset, whose `to_zarr` writes text of any length, and gives no warning."""

    __slots__ = ()

    def to_zarr(self, *args: Any, **options: Any) -> Any:
        """Write to a Zarr store; arguments and result are those of `xarray.Dataset.to_zarr`."""
        with _quiet_metadata():
            return _with_free_texts(self).to_zarr(*args, **options)


class DataTree(xr.DataTree):
    """xarray's tree, whose HTML opens with attributes and groups expanded.

    By default xarray collapses ten attributes or 20 items, and a notebook shows the names of the
    groups alone. `to_zarr` is as that of `CubeDataset`. The class has xarray's name, since the name
    is the heading of the HTML.
    """

    __slots__ = ()

    def to_dataset(self, inherit: Any = True) -> CubeDataset:
        """Return a node as a `CubeDataset`; otherwise as `xarray.DataTree.to_dataset`."""
        node = super().to_dataset(inherit)
        return CubeDataset(node.data_vars, node.coords, node.attrs)

    def to_zarr(self, *args: Any, **options: Any) -> Any:
        """Write to a Zarr store; arguments and result are those of `xarray.DataTree.to_zarr`."""
        nodes = {
            node.path: _with_free_texts(node.to_dataset(inherit=False)) for node in self.subtree
        }
        with _quiet_metadata():
            return xr.DataTree.from_dict(nodes).to_zarr(*args, **options)

    def _repr_html_(self) -> str:
        options = xr.get_options()
        expanded: dict[str, Any] = {"display_max_items": max(100, options["display_max_items"])}
        if options["display_expand_attrs"] == "default":
            expanded["display_expand_attrs"] = True
        with xr.set_options(**expanded):
            html: str = super()._repr_html_()
            return html


def _with_free_texts(dataset: xr.Dataset) -> xr.Dataset:
    """Return xarray's own dataset, with each text of fixed width as one of any length."""
    texts = {
        name: (variable.dims, variable.data.astype(np.dtypes.StringDType()), variable.attrs)
        for name, variable in dataset.variables.items()
        if variable.dtype.kind == "U"
    }
    coords = {name: text for name, text in texts.items() if name in dataset.coords}
    others = {name: text for name, text in texts.items() if name not in coords}
    plain = xr.Dataset(dataset.data_vars, dataset.coords, dataset.attrs)
    return plain.assign_coords(coords).assign(others)


@contextlib.contextmanager
def _quiet_metadata() -> Iterator[None]:
    """Hide Zarr's warning about consolidated metadata."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata")
        yield
