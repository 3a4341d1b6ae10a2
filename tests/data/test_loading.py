"""Loading by name: its errors, its imports, and the packages that it can do without."""

import importlib.abc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sampimp
from sampimp.data import load_dataset, load_source, scale_inputs
from sampimp.errors import MissingPackageError, UserError


def test_error_has_four_parts_and_no_context(tmp_path):
    with pytest.raises(UserError) as caught:
        load_source(f"npz:{tmp_path}/missing.npz")
    assert [line[:8].strip() for line in str(caught.value).splitlines()] == [
        *("Expected", "Got", "Where", "To do")
    ]
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_load_dataset_loads_and_scales():
    loaded = load_dataset("digits", scaling="standard")
    scaled = scale_inputs(load_source("digits"), "standard")
    for actual, expected in zip(loaded, scaled, strict=True):
        np.testing.assert_array_equal(actual, expected, strict=True)


@pytest.mark.parametrize(
    "code", ["import sampimp.data", "import sampimp; sampimp.load_dataset, sampimp.Dataset"]
)
def test_heavy_packages_are_not_imported(code):
    """Ray's workers import this package to decode images; most of them need nothing else."""
    code += "; import sys, json; print(json.dumps(sorted(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(Path(sampimp.__file__).parents[1])}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True, env=environment
    ).stdout
    heavy = {"torch", "ray", "zarr", "sklearn", "PIL", "pooch", "xarray", "dask"}
    assert not heavy & set(json.loads(out))


class Hider(importlib.abc.MetaPathFinder):
    """Hides a package, as if it were not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


@pytest.mark.parametrize(
    ("package", "name"), [("sklearn", "digits"), ("pooch", "mnist"), ("PIL", "folder:{folder}")]
)
def test_missing_package_error_names_the_extra(monkeypatch, tmp_path, package, name):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "0.png").write_bytes(b"")
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Hider(package), *sys.meta_path])
    with pytest.raises(MissingPackageError, match=package) as caught:
        load_source(name.format(folder=tmp_path))
    assert caught.value.todo == "pip install 'sampimp[study]'"
