"""Error messages keep their four parts; a missing optional package is reported with its extra."""

import pickle
import sys

import pytest

from sampimp import errors
from sampimp.errors import MissingPackageError, require_package

CLASSES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.UserError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_errors_survive_pickling(kind):
    error = kind("a bucket", "none", "s3://b", "make it")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    expected = "Expected a bucket\n     Got none\n   Where s3://b\n   To do make it"
    assert str(copy) == str(error) == expected


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.inner", "json.no_such"])
def test_missing_package_error_names_package_and_extra(module):
    with pytest.raises(MissingPackageError) as caught:
        require_package(module, "study")
    assert caught.value.expected == f"the Python package {module.partition('.')[0]}"
    assert "No module named" in caught.value.got
    assert sys.executable in caught.value.where
    assert caught.value.todo == "pip install 'sampimp[study]'"


def test_require_package_imports_an_installed_module():
    require_package("json.tool", "study")
    assert "json.tool" in sys.modules


def test_missing_dependency_of_an_installed_package_is_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "incomplete_package.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        require_package("incomplete_package", "study")
    assert not isinstance(caught.value, MissingPackageError)
