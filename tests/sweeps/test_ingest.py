"""Ingest through Ray Data gives the bytes and the errors of `load_source`."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from sampimp.data import images, load_source
from sampimp.errors import ConfigError, DataError
from sampimp.sweeps.ingest import decode_block, ingest


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs on loopback, unless a session has already started Ray."""
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


@pytest.fixture
def small_blocks(monkeypatch):
    """Four images of 6 x 5 x 3 bytes a block, so that blocks finish in any order."""
    monkeypatch.setattr(images, "_BLOCK_BYTES", 4 * 90)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three classes, 11 training and 3 test images each: 42 images, 11 blocks of four."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 11), ("test", 3)):
        for name in ("ant", "bee", "cow"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number:04}.png")
    return tmp_path


def test_same_bytes_as_the_plain_loader(cluster, small_blocks, folder):
    calls = []
    source = ingest(f"folder:{folder}", progress=lambda done, total: calls.append((done, total)))
    plain = load_source(f"folder:{folder}")
    resized = ingest(f"folder:{folder}", None, 4)
    assert resized.train_values.shape[1:] == (3, 4, 4)
    assert resized.digest == load_source(f"folder:{folder}", image_size=4).digest
    np.testing.assert_array_equal(source.train_values, plain.train_values, strict=True)
    np.testing.assert_array_equal(source.test_labels, plain.test_labels, strict=True)
    assert source.digest == plain.digest
    assert source.name == plain.name
    assert source.class_names == ("ant", "bee", "cow")
    assert calls[-1] == (42, 42)
    assert len(calls) == 11
    assert calls == sorted(calls)


def test_the_first_bad_image_raises_the_error_of_load_source(cluster, small_blocks, folder, capfd):
    Image.new("RGB", (5, 7)).save(folder / "test/bee/0001.png")
    (folder / "train/bee/0007.png").write_bytes(b"no image")
    for path in ("train/bee/0007.png", "train/bee/0005.png"):
        (folder / path).write_bytes(b"no image")
        with pytest.raises(DataError) as plain:
            load_source(f"folder:{folder}")
        with pytest.raises(DataError) as caught:
            ingest(f"folder:{folder}")
        assert type(caught.value) is DataError
        assert caught.value.where == str(folder / path)
        assert str(caught.value) == str(plain.value)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


def test_nothing_is_printed_and_settings_are_restored(cluster, folder, capfd):
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, logging.getLogger("ray.data").level
    ingest(f"folder:{folder}")
    assert ray.data.DataContext.get_current() is context
    assert (context.enable_progress_bars, logging.getLogger("ray.data").level) == before
    assert capfd.readouterr() == ("", "")


def test_other_data_sets_are_read_by_load_source():
    """No Ray cluster runs: these start no task."""
    assert ingest("digits").digest == load_source("digits").digest
    with pytest.raises(ConfigError, match="did you mean 'mnist'"):
        ingest("MNIST")
    with pytest.raises(ConfigError, match="folder:PATH"):
        ingest("folder:")


def test_layout_is_checked_before_any_task(tmp_path):
    with pytest.raises(DataError, match="no folder train/"):
        ingest(f"folder:{tmp_path}")


def test_decode_block_keeps_rows_together(folder):
    paths = [str(folder / "train/ant" / f"{number:04}.png") for number in (2, 0)]
    batch = {"sample": np.array([17, 3]), "path": np.array(paths, dtype=object)}
    rows = decode_block(batch, shape=(3, 6, 5))
    np.testing.assert_array_equal(rows["sample"], [17, 3])
    for row, path in zip(rows["image"], paths, strict=True):
        np.testing.assert_array_equal(row, np.asarray(Image.open(path)).transpose(2, 0, 1))
    assert rows["error"].tolist() == ["", ""]
    batch["path"][1] = str(folder / "gone.png")
    rows = decode_block(batch, shape=(3, 6, 5))
    expected, got, where, todo = json.loads(rows["error"][0])
    assert (expected, where) == ("a readable image", str(folder / "gone.png"))
    assert "FileNotFoundError" in got
    assert "every machine" in todo


REAL = os.environ.get("SAMPIMP_DATA", "")


@pytest.mark.skipif(
    not REAL or not (Path(REAL) / "cifar10" / "train").is_dir(),
    reason="SAMPIMP_DATA has no cifar10/train/",
)
def test_real_images(cluster):
    name = f"folder:{REAL}/cifar10"
    assert ingest(name).digest == load_source(name).digest
