"""Symbolic links that lead out of a folder are refused, and none is followed to delete."""

import os
import shutil

import oracles
import pytest

from sampimp.errors import StoreError
from sampimp.store.datasets import read_source, write_source
from sampimp.store.location import Folder
from sampimp.store.zarr_arrays import zarr_store


@pytest.fixture
def linked(tmp_path):
    """A root reached through a link, with a trial in it and a folder outside."""
    (tmp_path / "disk" / "study" / "trial" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "study" / "other").mkdir()
    (tmp_path / "outside").mkdir()
    for file in ("outside/precious", "disk/study/other/kept", "disk/study/trial/deep/x"):
        (tmp_path / file).write_bytes(b"1")
    (tmp_path / "study").symlink_to(tmp_path / "disk" / "study")
    return Folder.of(tmp_path / "study")


OUTSIDE = ("../../../outside", "../../../outside/precious", "../../../outside/new")
"""Targets relative to a trial: a folder, a file, and a path that does not exist."""


@pytest.mark.parametrize("target", OUTSIDE)
def test_a_link_out_of_the_root_is_refused_with_its_path(linked, tmp_path, target):
    link = tmp_path / "study" / "trial" / "link"
    link.symlink_to(target)
    trial = linked / "trial"
    for use in (
        lambda: trial.read_bytes("link"),
        lambda: trial.read_json("link/precious"),
        lambda: trial.write_bytes("link", b"2"),
        lambda: trial.write_json("link/precious", 2),
        lambda: trial.create_bytes("link/deeper/new", b"2"),
        lambda: trial.delete("link"),
        lambda: trial.delete("link/precious"),
        lambda: (trial / "link").folders(),
        lambda: (trial / "link").files(),
        lambda: (trial / "link").size(),
        lambda: (trial / "link").remove(),
        lambda: (trial / "link" / "deeper").remove(),
        lambda: trial.remove(),
        lambda: zarr_store(trial / "link"),
        lambda: write_source(trial / "link" / "made.zarr", oracles.make_source()),
    ):
        with pytest.raises(StoreError, match=f"Where {link}\n"):
            use()
    assert link.is_symlink()
    assert os.listdir(tmp_path / "outside") == ["precious"]
    assert (tmp_path / "outside" / "precious").read_bytes() == b"1"
    assert trial.read_bytes("deep/x") == b"1"  # nothing was deleted
    assert linked.size() == 2


def test_zarr_follows_no_link_out_of_the_root(linked, tmp_path):
    write_source(linked / "made.zarr", oracles.make_source())
    for name in ("train_labels", "train_values/c/0"):
        place = tmp_path / "study" / "made.zarr" / name
        shutil.move(place, tmp_path / "moved")
        place.symlink_to(tmp_path / "moved")
        before = {path: path.read_bytes() for path in (tmp_path / "moved").rglob("*.json")}
        with pytest.raises(StoreError, match=f"Where .*{name}"):
            read_source(linked / "made.zarr")
        with pytest.raises(StoreError, match=f"Where .*{name}"):
            write_source(linked / "made.zarr", oracles.make_source())
        assert {path: path.read_bytes() for path in before} == before
        place.unlink()
        shutil.move(tmp_path / "moved", place)
    assert read_source(linked / "made.zarr") is not None


def test_deleting_a_link_inside_the_root_keeps_its_target(linked, tmp_path):
    study = tmp_path / "study"
    trial = linked / "trial"
    for name, target in (("folder", "../other"), ("file", "../other/kept"), ("loop", "..")):
        (study / "trial" / name).symlink_to(target)
    assert trial.read_bytes("file") == b"1"
    assert (trial / "folder").files() == ["kept"]
    with pytest.raises(StoreError, match="in the path of the object to be deleted"):
        trial.delete("folder/kept")
    trial.write_bytes("file", b"2")
    assert not (study / "trial" / "file").is_symlink()  # the link was replaced
    assert linked.read_bytes("other/kept") == b"1"
    trial.delete("folder")
    (study / "trial" / "folder").symlink_to("../other")
    (trial / "folder").remove()
    assert not (study / "trial" / "folder").is_symlink()
    trial.remove()
    assert sorted(os.listdir(study)) == ["other"]
    assert linked.read_bytes("other/kept") == b"1"
    linked.remove()
    assert os.listdir(tmp_path / "disk" / "study") == []


@pytest.mark.parametrize("name", ["../outside", "trial/../../outside"])
def test_a_name_with_dots_out_of_the_root_is_refused(linked, name):
    for use in (lambda: linked.read_bytes(f"{name}/precious"), lambda: (linked / name).remove()):
        with pytest.raises(StoreError, match="leads out"):
            use()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    folder = Folder.of(tmp_path)
    os.mkfifo(tmp_path / "study.json")
    os.mkfifo(tmp_path / "made.zarr")
    (tmp_path / "link.json").symlink_to("study.json")
    for name in ("study.json", "link.json"):
        with pytest.raises(StoreError, match=rf"Got a pipe\n +Where {tmp_path}/{name}"):
            folder.read_json(name)
    with pytest.raises(StoreError, match="Got a pipe"):
        zarr_store(folder / "made.zarr")


def test_a_device_is_refused(tmp_path):
    (tmp_path / "study.json").symlink_to("/dev/zero")
    with pytest.raises(StoreError, match="a link to /dev/zero"):
        Folder.of(tmp_path).read_json("study.json")
    with pytest.raises(StoreError, match="Got a device"):
        Folder.of("/dev").read_bytes("zero")
