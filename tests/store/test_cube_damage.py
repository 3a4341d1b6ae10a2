"""Damage to a record or a data set raises an error when the cube reads it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import oracles
import pytest

import sampimp
from sampimp.errors import RecordError
from sampimp.store import datasets
from sampimp.store.datasets import read_source
from sampimp.store.location import Folder
from sampimp.sweeps import status


@pytest.fixture
def small_study(tmp_path):
    """One committed trial: its folder, and its node of the cube."""
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,)})
    folder = oracles.start_study(tmp_path, plan, sources)
    oracles.run_trials(folder, plan, sources)
    (trial,) = (tmp_path / "trials").iterdir()
    return trial, sampimp.open_cube(tmp_path)["one"]


DAMAGES = {
    "deleted": lambda chunk: chunk.unlink(),
    "truncated": lambda chunk: chunk.write_bytes(chunk.read_bytes()[:-3]),
    "empty": lambda chunk: chunk.write_bytes(b""),
    "of another epoch": lambda chunk: chunk.write_bytes(
        (chunk.parents[chunk.parts[::-1].index("c") - 1] / "0" / "0" / chunk.name).read_bytes()
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_chunk_is_an_error_and_never_a_number(small_study, name):
    trial, node = small_study
    (chunk,) = (trial / "record.zarr" / "importance" / "c" / "1").rglob("0/0")
    whole = node["importance"].compute()
    DAMAGES[name](chunk)
    for part in (node["importance"], node["importance"].sel(epoch=2, layer="L1", sample=[3, 5])):
        with pytest.raises(RecordError, match=r"importance, epoch 2\n +To do run sweeps/status.py"):
            part.compute()
    rest = node["importance"].sel(epoch=[1, 3])  # the other chunks are intact
    np.testing.assert_array_equal(rest, whole.sel(epoch=[1, 3]))


@pytest.mark.parametrize("offset", [0, 7, 40])
def test_a_flipped_bit_is_an_error(small_study, offset):
    trial, node = small_study
    (chunk,) = (trial / "record.zarr" / "parameters" / "c").glob("3/0")
    content = bytearray(chunk.read_bytes())
    content[offset] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(RecordError, match="parameters, state 3"):
        node["parameters"].compute()


# Damage to a data set.
@pytest.fixture
def made(tmp_path, monkeypatch):
    """A study with one committed trial; its data set has chunks of four images or 16 labels."""
    monkeypatch.setattr(datasets, "SOURCE_CHUNK", 128)
    sources = {"one": oracles.make_source(samples=24, shape=(2, 4, 4))}
    plan = oracles.make_plan(sources, {"shuffle": (1,)}, epochs=1)
    folder = oracles.start_study(tmp_path, plan, sources)
    oracles.run_trials(folder, plan, sources)
    return tmp_path, tmp_path / "datasets" / "one.zarr", sources["one"]


def rewrite(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def exchange(first, second):
    first.rename(first.with_name("third"))
    second.rename(first)
    first.with_name("third").rename(second)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def stretch(value):
    value["shape"][0] += 8


def of_another_type(value):
    value["data_type"] = "int8"


def forget_digests(value):
    del value["attributes"]["chunks"]


def with_another_scale(value):
    value["attributes"]["chunks"]["full_scale"] = 16.0


DAMAGE = {
    "labels deleted": ("train_labels", lambda at: shutil.rmtree(at / "train_labels")),
    "chunk of labels deleted": ("train_labels", lambda at: (at / "train_labels/c/1").unlink()),
    "byte of labels": ("train_labels", lambda at: flip(at / "train_labels/c/1")),
    "labels swapped": (
        "train_labels",
        lambda at: exchange(at / "train_labels/c/0", at / "train_labels/c/1"),
    ),
    "more labels": ("train_labels", lambda at: rewrite(at / "train_labels/zarr.json", stretch)),
    "array of labels unnamed": (
        "train_labels",
        lambda at: (at / "train_labels/zarr.json").unlink(),
    ),
    "digests forgotten": ("zarr.json", lambda at: rewrite(at / "zarr.json", forget_digests)),
    "another scale": ("zarr.json", lambda at: rewrite(at / "zarr.json", with_another_scale)),
    "no JSON": ("one.zarr", lambda at: (at / "zarr.json").write_text("{")),
    "unnamed": ("one.zarr", lambda at: (at / "zarr.json").unlink()),
    "all deleted": ("one.zarr", shutil.rmtree),
    "images deleted": ("train_values", lambda at: shutil.rmtree(at / "train_values")),
    "chunk of images deleted": (
        "train_values, rows 12 to 15",
        lambda at: (at / "train_values/c/3/0/0/0").unlink(),
    ),
    "byte of images": (
        "train_values, rows 12 to 15",
        lambda at: flip(at / "train_values/c/3/0/0/0"),
    ),
    "images swapped": (
        "train_values",  # either of the exchanged chunks, depending on the order of reading
        lambda at: exchange(at / "train_values/c/1", at / "train_values/c/2"),
    ),
    "images of another type": (
        "train_values",
        lambda at: rewrite(at / "train_values/zarr.json", of_another_type),
    ),
    "test labels swapped": (
        "test_labels",
        lambda at: flip(at / "test_labels/c/0"),
    ),
    "test images deleted": ("test_values", lambda at: (at / "test_values/c/0/0/0/0").unlink()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_to_a_data_set_is_an_error_and_never_a_number(made, capsys, name):
    out, where, source = made
    node = sampimp.open_cube(out)["one"]
    np.testing.assert_array_equal(node["label"], source.train_labels)
    expected = np.moveaxis(source.train_values, 1, 3)
    np.testing.assert_array_equal(node["image"], expected)
    np.testing.assert_array_equal(node["image"][7:16:3, 1], expected[7:16:3, 1])
    np.testing.assert_array_equal(node["image"].data[20], expected[20])
    assert status.main([str(out), "--verify"]) == 0
    assert re.search("data sets +1 +every byte is as it was written", capsys.readouterr().out)

    place, damage = DAMAGE[name]
    damage(where)
    assert status.main([str(out), "--verify"]) == 1
    output = capsys.readouterr().out
    assert "data set one is damaged: " in output
    assert re.search("committed trials +1 +every byte is as it was written", output)
    if place.startswith("test_"):
        sampimp.open_cube(out)["one"]["image"].compute()
    else:
        with pytest.raises(RecordError, match=f"Where {where.parent}.*{place}") as caught:
            sampimp.open_cube(out)["one"]["image"].compute()
        assert all(part.strip() for part in caught.value.args)
        if place.startswith("train_values"):  # the labels are intact
            assert sampimp.open_cube(out)["one"]["label"].shape == (24,)
    if name == "no JSON":
        assert read_source(Folder.of(where)) is None
    elif (where / "zarr.json").is_file() and name != "digests forgotten":
        # Without the plan, the whole data set is compared with its own digest.
        with pytest.raises(RecordError):
            read_source(Folder.of(where))


def test_a_data_set_stored_without_digests_is_read_unverified(made, capsys):
    out, where, source = made
    rewrite(where / "zarr.json", forget_digests)
    Path(f"{where}.manifest.json").unlink()
    rewrite(out / "study.json", lambda plan: plan["datasets"]["one"].pop("chunks"))
    node = sampimp.open_cube(out)["one"]
    np.testing.assert_array_equal(node["label"], source.train_labels)
    np.testing.assert_array_equal(node["image"], np.moveaxis(source.train_values, 1, 3))
    assert read_source(Folder.of(where)).digest == source.digest
    assert status.main([str(out), "--verify"]) == 0
    assert "1 of an earlier version" in capsys.readouterr().out
    flip(where / "train_values/c/3/0/0/0")
    assert status.main([str(out), "--verify"]) == 1
    assert "data set one is damaged" in capsys.readouterr().out
    shutil.rmtree(where / "train_labels")
    with pytest.raises(RecordError, match="the arrays train_values, train_labels"):
        sampimp.open_cube(out)
