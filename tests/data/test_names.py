"""Names of data sets and their keys."""

import pytest

from sampimp.data import dataset_key, load_source
from sampimp.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mnist", "mnist"),
        ("cifar10", "cifar10"),
        ("digits", "digits"),
        ("folder:/x/cifar10", "folder-cifar10"),
        ("folder:/x/cifar10/", "folder-cifar10"),
        ("npz:/x/my data.npz", "npz-my_data"),
        ("npz:/x/v1.2/a.b.npz", "npz-a_b"),
    ],
)
def test_dataset_key(name, key):
    assert dataset_key(name) == key


def test_key_of_a_relative_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert dataset_key("folder:.") == f"folder-{tmp_path.name}"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("MNIST", "mnist"), ("cifar-10", "cifar10"), ("digit", "digits"), ("a.npz", "npz:a.npz")],
)
def test_unknown_name_error_suggests_the_nearest(name, nearest):
    for function in (dataset_key, load_source):
        with pytest.raises(ConfigError, match=f"did you mean '{nearest}'"):
            function(name)


def test_path_without_a_kind_is_suggested_as_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=f"did you mean 'folder:{tmp_path}'"):
        dataset_key(str(tmp_path))
