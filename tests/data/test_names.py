"""Data sets: every loader gives the values that were written, and a bad file is named as such."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sampimp.data import names as data
from sampimp.data.names import (
    Source,
    dataset_key,
    decode_image,
    decode_images,
    image_blocks,
    list_images,
    load_dataset,
    load_source,
    scale_inputs,
)
from sampimp.errors import ConfigError, DataError, UserError


@pytest.fixture(autouse=True)
def no_data_and_no_cache(monkeypatch, tmp_path_factory):
    """No test finds the developer's files, or reaches further than loopback."""
    monkeypatch.delenv("SAMPIMP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(data, "_MNIST_MIRRORS", ("http://127.0.0.1:9/",))  # discard: no one listens
    monkeypatch.setattr(data, "_CIFAR10_MIRRORS", ("http://127.0.0.1:9/",))


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def has_no_context(error: BaseException) -> bool:
    """Whether a traceback would show this error alone."""
    return error.__suppress_context__ or error.__context__ is None


def make_source(**changes) -> Source:
    values = {
        "name": "made",
        "train_values": np.arange(12, dtype=np.float32).reshape(4, 3),
        "train_labels": np.array([0, 1, 0, 1]),
        "test_values": np.ones((2, 3), dtype=np.float32),
        "test_labels": np.array([1, 0]),
        "full_scale": 1.0,
        "class_names": ("a", "b"),
    }
    return Source(**(values | changes))


# ------------------------------------------------------------------------------ names


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
def test_key(name, key):
    assert dataset_key(name) == key


def test_key_of_a_relative_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert dataset_key("folder:.") == f"folder-{tmp_path.name}"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("MNIST", "mnist"), ("cifar-10", "cifar10"), ("digit", "digits"), ("a.npz", "npz:a.npz")],
)
def test_unknown_name_suggests_the_nearest(name, nearest):
    for function in (dataset_key, load_source):
        with pytest.raises(ConfigError, match=f"did you mean '{nearest}'"):
            function(name)


def test_a_bare_path_is_suggested_as_folder(tmp_path):
    with pytest.raises(ConfigError, match=f"did you mean 'folder:{tmp_path}'"):
        dataset_key(str(tmp_path))


# ----------------------------------------------------------------------------- source


def test_digest_is_of_every_value():
    digests = {
        make_source().digest,
        make_source(train_values=np.zeros((4, 3), np.float32)).digest,
        make_source(train_labels=np.array([1, 0, 0, 1])).digest,
        make_source(test_values=np.zeros((2, 3), np.float32)).digest,
        make_source(test_labels=np.array([0, 1])).digest,
        make_source(full_scale=2.0).digest,
    }
    assert len(digests) == 6
    assert make_source().digest == make_source(name="other").digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.array([0, 1, 0])}, "4 inputs and 3 labels"),
        ({"train_values": np.zeros((0, 3), np.float32)}, r"float32 \[0, 3\]"),
        ({"train_values": np.zeros((4, 0), np.float32)}, r"float32 \[4, 0\]"),
        ({"train_values": np.zeros(4, np.float32)}, r"float32 \[4\]"),
        ({"train_values": np.zeros((4, 3))}, r"float64 \[4, 3\]"),
        ({"train_labels": np.array([0.0, 1, 0, 1])}, r"float64 \[4\]"),
        ({"train_labels": np.eye(4, dtype=np.int64)}, r"int64 \[4, 4\]"),
        ({"train_labels": np.array([0, 1, 2, 5])}, r"2 at sample 2 \(2 out of range\)"),
        ({"test_labels": np.array([0, -1])}, r"-1 at sample 1 .*\n.*made, test set"),
        ({"train_labels": np.zeros(4, np.int64)}, "no training sample of 1 of its classes: b"),
        ({"test_values": np.ones((2, 4), np.float32)}, r"float32 \(4,\)"),
        ({"test_values": np.ones((2, 3), np.uint8)}, r"uint8 \(3,\)"),
    ],
)
def test_bad_source(changes, message):
    with pytest.raises(DataError, match=message):
        make_source(**changes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_first_value_that_is_not_finite_is_named(value):
    values = np.zeros((4, 3, 2), np.float32)
    values[2, 1, 0] = values[3, 0, 0] = value
    message = rf"{value} at sample 2, position \[1, 0\] \(2 such values\)"
    with pytest.raises(DataError, match=message):
        make_source(train_values=values, test_values=values[:2])


def test_an_error_has_four_parts_and_no_context(tmp_path):
    with pytest.raises(UserError) as caught:
        load_source(f"npz:{tmp_path}/missing.npz")
    assert [line[:8].strip() for line in str(caught.value).splitlines()] == [
        *("Expected", "Got", "Where", "To do")
    ]
    assert has_no_context(caught.value)


# ------------------------------------------------------------------------------ MNIST


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def tiny_mnist(monkeypatch):
    """Seven training images, of which the first five are used, and three test images."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (7, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.array([3, 1, 4, 1, 5, 9, 2], dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.array([5, 3, 1], dtype=np.uint8),
    }
    packed = {name: gzip.compress(idx(array), mtime=0) for name, array in arrays.items()}
    official = {
        name: data._Official(md5(idx(array)), len(idx(array)), md5(packed[name]))
        for name, array in arrays.items()
    }
    monkeypatch.setattr(data, "_MNIST", official)
    monkeypatch.setattr(data, "MNIST_TRAIN", 5)
    return arrays, packed


def check_tiny_mnist(source: Source, arrays) -> None:
    np.testing.assert_array_equal(
        source.train_values, arrays["train-images-idx3-ubyte"][:5, None], strict=True
    )
    np.testing.assert_array_equal(source.train_labels, np.array([3, 1, 4, 1, 5]), strict=True)
    np.testing.assert_array_equal(
        source.test_values, arrays["t10k-images-idx3-ubyte"][:, None], strict=True
    )
    np.testing.assert_array_equal(source.test_labels, np.array([5, 3, 1]), strict=True)
    assert source.full_scale == 255
    assert source.class_names == tuple("0123456789")


@pytest.mark.parametrize("home", ["mnist", "MNIST/raw", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_on_disk(tiny_mnist, tmp_path, monkeypatch, home, packed):
    arrays, _ = tiny_mnist
    (tmp_path / home).mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        # Another wrapping than the mirrors': only the unpacked bytes have to be the official ones.
        content = gzip.compress(idx(array), compresslevel=1, mtime=7) if packed else idx(array)
        (tmp_path / home / f"{name}{'.gz' if packed else ''}").write_bytes(content)
    check_tiny_mnist(load_source("mnist", tmp_path), arrays)
    monkeypatch.setenv("SAMPIMP_DATA", str(tmp_path))
    check_tiny_mnist(load_source("mnist"), arrays)


@pytest.mark.parametrize("damage", ["truncated gz", "truncated", "other bytes", "empty"])
def test_damaged_mnist_is_named(tiny_mnist, tmp_path, damage):
    arrays, packed = tiny_mnist
    for name, content in packed.items():
        (tmp_path / f"{name}.gz").write_bytes(content)
    victim = tmp_path / "t10k-images-idx3-ubyte.gz"
    good = idx(arrays["t10k-images-idx3-ubyte"])
    content = {
        "truncated gz": victim.read_bytes()[:-100],
        "truncated": good[:-100],
        "other bytes": gzip.compress(good[:-1] + b"?"),
        "empty": b"",
    }[damage]
    victim.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_source("mnist", tmp_path)
    message = str(caught.value)
    # 16 bytes of header and 3 images of 28 x 28: 2,368 bytes.
    assert str(victim) in message
    assert "2,368 bytes" in message
    assert md5(good) in message
    got = {"truncated gz": len(content), "truncated": 2268, "other bytes": 2368, "empty": 0}[damage]
    assert f"{got:,} bytes" in caught.value.got
    assert "remove the file" in caught.value.todo


def test_missing_data_folder(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no such folder\n.*nowhere \(data_dir\)"):
        load_source("mnist", tmp_path / "nowhere")
    monkeypatch.setenv("SAMPIMP_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere \(SAMPIMP_DATA\)"):
        load_source("cifar10")


# ------------------------------------------------------------------------------ fetch


class QuietBar:
    """In place of tqdm: pooch asks for one, and the tests need not."""

    def __init__(self, **_):
        self.total = 0

    def update(self, _):
        pass

    reset = close = lambda self: None


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Yield a folder that a server on loopback offers, and the server's requests."""
    monkeypatch.setattr("pooch.downloaders.tqdm", QuietBar)
    folder = tmp_path / "mirror"
    folder.mkdir()
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        # The first mirror is dead: the second is asked.
        monkeypatch.setattr(data, "_MNIST_MIRRORS", ("http://127.0.0.1:9/", url))
        monkeypatch.setattr(data, "_CIFAR10_MIRRORS", (url,))
        yield folder, requests
        server.shutdown()


def test_mnist_is_fetched_once(tiny_mnist, mirror):
    arrays, packed = tiny_mnist
    folder, requests = mirror
    for name, content in packed.items():
        (folder / f"{name}.gz").write_bytes(content)
    check_tiny_mnist(load_source("mnist"), arrays)
    assert len(requests) == 4
    check_tiny_mnist(load_source("mnist"), arrays)
    assert len(requests) == 4


def test_a_wrong_download_is_refused(tiny_mnist, mirror):
    _, packed = tiny_mnist
    folder, _ = mirror
    for name in packed:
        (folder / f"{name}.gz").write_bytes(gzip.compress(b"<html>log in first</html>"))
    with pytest.raises(DataError, match="hash"):
        load_source("mnist")


@pytest.mark.parametrize(("name", "home"), [("mnist", "mnist"), ("cifar10", "cifar10")])
def test_no_files_and_no_network(name, home, tmp_path, monkeypatch):
    monkeypatch.setattr("pooch.downloaders.tqdm", QuietBar)
    with pytest.raises(DataError) as caught:
        load_source(name, tmp_path)
    assert f"not under {tmp_path}" in caught.value.got
    assert "ConnectionError" in caught.value.got
    assert "http://127.0.0.1:9/" in caught.value.todo
    assert f"DIR/{home}" in caught.value.todo
    assert "SAMPIMP_DATA=DIR" in caught.value.todo
    assert has_no_context(caught.value)


# --------------------------------------------------------------------------- CIFAR-10


class OldDtype:
    """Pickles as the `dtype("u1", 0, 1)` of the official files, which NumPy 2.4 deprecates."""

    def __reduce__(self):
        return np.dtype, ("u1", 0, 1)


@pytest.fixture
def tiny_cifar10(monkeypatch):
    """Six batches of two images; the value of a pixel tells batch, image and channel."""
    batches = {}
    for number, name in enumerate(data._CIFAR10):
        images = np.zeros((2, 3, 32, 32), np.uint8)
        for image in range(2):
            for channel in range(3):
                images[image, channel] = 100 * image + 10 * channel + number
        content = {
            b"data": images.reshape(2, 3072),
            b"labels": [0, 9],
            b"dtype": OldDtype(),
        }
        batches[name] = pickle.dumps(content, protocol=2)
    official = {name: data._Official(md5(content)) for name, content in batches.items()}
    monkeypatch.setattr(data, "_CIFAR10", official)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in {"readme.html": b"hello", **batches}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    packed = stream.getvalue()
    monkeypatch.setattr(data, "_CIFAR10_TAR", data._Official(md5(packed), len(packed)))
    return batches, packed


def check_tiny_cifar10(source: Source) -> None:
    assert source.train_values.shape == (10, 3, 32, 32)
    assert source.test_values.shape == (2, 3, 32, 32)
    # Batches 1 to 5 are numbers 0 to 4; image 0 then 1 in each; channels 0, 10, 20.
    np.testing.assert_array_equal(
        source.train_values[:, 1, 5, 6], [10, 110, 11, 111, 12, 112, 13, 113, 14, 114]
    )
    np.testing.assert_array_equal(source.test_values[1, :, 31, 31], [105, 115, 125])
    np.testing.assert_array_equal(source.train_labels, np.array([0, 9] * 5), strict=True)
    assert source.class_names[0] == "airplane"
    assert source.class_names[7] == "horse"
    assert source.class_names[9] == "truck"


@pytest.mark.parametrize("home", ["cifar10", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_on_disk(tiny_cifar10, tmp_path, home, packed):
    batches, archive = tiny_cifar10
    folder = tmp_path / home
    folder.mkdir(exist_ok=True)
    if packed:
        (folder / "cifar-10-python.tar.gz").write_bytes(archive)
    else:
        (folder / "cifar-10-batches-py").mkdir()
        for name, content in batches.items():
            (folder / "cifar-10-batches-py" / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_tiny_cifar10(load_source("cifar10", tmp_path))


def test_cifar10_is_fetched(tiny_cifar10, mirror):
    _, archive = tiny_cifar10
    folder, requests = mirror
    (folder / "cifar-10-python.tar.gz").write_bytes(archive)
    check_tiny_cifar10(load_source("cifar10"))
    check_tiny_cifar10(load_source("cifar10"))
    assert len(requests) == 1


def test_damaged_cifar10_is_named(tiny_cifar10, tmp_path):
    batches, archive = tiny_cifar10
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive[:-9])
    with pytest.raises(DataError, match=rf"{len(archive):,} bytes(.|\n)*cifar-10-python.tar.gz"):
        load_source("cifar10", tmp_path)
    folder = tmp_path / "cifar-10-batches-py"  # preferred to the archive beside it
    folder.mkdir()
    for name, content in batches.items():
        (folder / name).write_bytes(content)
    (folder / "data_batch_3").write_bytes(b"not a pickle")
    with pytest.raises(DataError, match=r"12 bytes(.|\n)*data_batch_3"):
        load_source("cifar10", tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="no data_batch_3"):
        load_source("cifar10", tmp_path)


# ----------------------------------------------------------------------------- digits


DIGITS_DIGEST = "6ff8dd258582f3e6"


def test_digits_is_a_stratified_partition():
    from sklearn.datasets import load_digits

    source = load_source("digits")
    assert source.train_values.shape == (1500, 1, 8, 8)
    assert source.test_values.shape == (297, 1, 8, 8)
    assert source.full_scale == 16
    every = np.concatenate([source.train_values, source.test_values]).reshape(-1, 64)
    original = load_digits().data.astype(np.uint8)
    # The same images, each as often: equal as sorted lists of rows.
    np.testing.assert_array_equal(np.sort(every.view("S64"), 0), np.sort(original.view("S64"), 0))
    train = np.bincount(source.train_labels)
    test = np.bincount(source.test_labels)
    np.testing.assert_allclose(test, (train + test) * 297 / 1797, atol=1)
    # Fixed for ever: results are compared across versions.
    assert source.digest.startswith(DIGITS_DIGEST)
    assert load_source("digits").digest == source.digest


# -------------------------------------------------------------------------------- npz


def save_npz(path: Path, **changes) -> str:
    arrays = {
        "train_inputs": np.arange(12.0).reshape(4, 3),
        "train_labels": np.array([0, 2, 0, 1], dtype=np.int8),
        "test_inputs": np.ones((2, 3)),
        "test_labels": np.array([1, 0], dtype=np.uint16),
    }
    np.savez(path, **(arrays | changes))
    return f"npz:{path}"


def test_npz(tmp_path):
    source = load_source(save_npz(tmp_path / "a.npz"))
    np.testing.assert_array_equal(
        source.train_values, np.arange(12, dtype=np.float32).reshape(4, 3), strict=True
    )
    np.testing.assert_array_equal(source.train_labels, np.array([0, 2, 0, 1]), strict=True)
    assert source.full_scale == 1
    assert source.class_names == ("0", "1", "2")


def test_npz_of_bytes_and_other_layouts(tmp_path):
    images = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    name = save_npz(tmp_path / "a.npz", train_inputs=images, test_inputs=images[:2])
    assert load_source(name).full_scale == 255
    assert load_source(name).train_values.dtype == np.uint8
    floats = np.arange(24.0).reshape(4, 3, 2)
    plain = save_npz(tmp_path / "b.npz", train_inputs=floats, test_inputs=floats[:2])
    odd = save_npz(
        tmp_path / "c.npz",
        train_inputs=np.asfortranarray(floats.astype(">f4")),
        test_inputs=floats[:2].astype(np.float16),
    )
    assert load_source(plain).digest == load_source(odd).digest
    assert load_source(odd).train_values.flags.c_contiguous


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_inputs": np.zeros((4, 3), np.int64)}, r"int64 \[4, 3\]"),
        ({"train_inputs": np.full((4, 3), 1e300)}, "inf at sample 0"),
        ({"train_inputs": np.float64(3)}, r"float32 \[\]"),
        ({"train_labels": np.array(["a", "b", "c", "d"])}, r"<U1 \[4\]"),
        ({"train_labels": np.array([0.0, np.nan, 1, 1])}, r"float64 \[4\]"),
        ({"train_labels": np.array([0, 10**12, 0, 1])}, r"labels in 0..3\n.*1000000000000 at"),
        ({"train_labels": np.array([], dtype=np.int64)}, "4 inputs and 0 labels"),
        ({"test_labels": np.array([1, -3])}, "-3 at sample 1"),
        ({"test_labels": np.array([1, 3])}, "no training sample of 1 of its classes: 3"),
        ({"train_inputs": np.array([{}, {}, {}, {}])}, "Object arrays cannot be loaded"),
    ],
)
def test_bad_npz_values(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_source(save_npz(tmp_path / "a.npz", **changes))


def test_bad_npz_files(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match="no such file"):
        load_source(f"npz:{path}")
    np.savez(path, train_inputs=np.zeros((2, 2)), y=np.zeros(2))
    with pytest.raises(DataError, match="the arrays train_inputs, y"):
        load_source(f"npz:{path}")
    save_npz(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=f"{len(whole) - 40:,} bytes that are no .npz archive"):
        load_source(f"npz:{path}")
    damaged = bytearray(whole)
    damaged[150] ^= 255  # inside the first array's values, so that its checksum is wrong
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="that NumPy cannot read"):
        load_source(f"npz:{path}")


# ------------------------------------------------------------------------------ images


def save_folder(root: Path, mode: str = "RGB", names=("b.png", "a.PNG", "10.png")) -> np.ndarray:
    """Write 3 training images and 1 test image of 2 classes, 5 wide and 4 high; return them all."""
    shape = (4, 5) if mode == "L" else (4, 5, 3)
    images = np.random.default_rng(1).integers(0, 256, (8, *shape), dtype=np.uint8)
    number = 0
    for part, files in (("train", sorted(names)), ("test", ["x.png"])):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for file in files:
                Image.fromarray(images[number]).save(folder / file)
                number += 1
    return images


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_folder(tmp_path, mode):
    images = save_folder(tmp_path, mode)
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "train" / "cat" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    listed = list_images(tmp_path)
    assert listed.class_names == ("cat", "dog")
    # In the order of the code points: digits, capitals, small letters.
    assert [Path(path).name for path in listed.train_paths[:3]] == ["10.png", "a.PNG", "b.png"]
    np.testing.assert_array_equal(listed.train_labels, [0, 0, 0, 1, 1, 1])
    source = load_source(f"folder:{tmp_path}")
    expected = images[:, None] if mode == "L" else images.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(source.train_values, expected[:6], strict=True)
    np.testing.assert_array_equal(source.test_values, expected[6:], strict=True)
    np.testing.assert_array_equal(source.test_labels, np.array([0, 1]), strict=True)
    assert source.train_values.flags.c_contiguous
    assert source.full_scale == 255


def test_a_relative_folder_gives_absolute_paths(tmp_path, monkeypatch):
    save_folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    assert list_images("pets").train_paths[0] == str(tmp_path / "pets/train/cat/10.png")


def test_folder_in_many_blocks(tmp_path, monkeypatch):
    save_folder(tmp_path)
    whole = load_source(f"folder:{tmp_path}")
    monkeypatch.setattr(data, "_BLOCK_BYTES", 3 * 60)  # three images of 4 x 5 x 3 bytes
    shape, blocks = image_blocks(list_images(tmp_path))
    assert shape == (3, 4, 5)
    assert blocks == [slice(0, 3), slice(3, 6), slice(6, 8)]
    assert load_source(f"folder:{tmp_path}").digest == whole.digest


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "test").rename(root / "validation"), "no folder test/"),
        (lambda root: (root / "train").rename(root / "training"), "no folder train/"),
        (lambda root: (root / "test/dog").rename(root / "test/dogs"), "in test/ alone: dogs"),
        (lambda root: (root / "test/dog").rename(root / "dog"), "in train/ alone: dog"),
        (lambda root: (root / "train/emu").mkdir(), "none in 1 of 3: emu"),
        (lambda root: (root / "train").rename(root / "x") and (root / "train").mkdir(), "no class"),
    ],
)
def test_bad_layout(tmp_path, spoil, message):
    save_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        list_images(tmp_path)


def test_first_bad_image_is_named(tmp_path, monkeypatch):
    save_folder(tmp_path)
    monkeypatch.setattr(data, "_BLOCK_BYTES", 60)  # one image a block: threads race
    first, second = tmp_path / "train/cat/a.PNG", tmp_path / "train/dog/b.png"
    second.write_bytes(b"no image")
    with pytest.raises(DataError, match=f"UnidentifiedImageError(.|\n)*{second}"):
        load_source(f"folder:{tmp_path}")
    first.write_bytes(first.read_bytes()[:60])
    with pytest.raises(DataError, match=f"{first}"):
        load_source(f"folder:{tmp_path}")
    Image.new("RGB", (6, 4)).save(first)
    with pytest.raises(DataError, match=f"has 5x4 pixels of 3(.|\n)*6x4(.|\n)*{first}"):
        load_source(f"folder:{tmp_path}")
    Image.new("L", (5, 4)).save(first)
    with pytest.raises(DataError, match=f"5x4 pixels of 1 (.|\n)*{first}"):
        load_source(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("mode", "values"), [("L", [[[7]]]), ("RGB", [[[7, 7, 7]]]), ("1", [[[255]]])]
)
def test_decode_modes(tmp_path, mode, values):
    Image.new(mode, (1, 1), 7 if mode != "RGB" else (7, 7, 7)).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png")
    np.testing.assert_array_equal(decoded, np.array(values, np.uint8), strict=True)


def test_decode_palette_is_lossless(tmp_path):
    image = Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8))
    image.quantize(2).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png"), [[[9, 8, 7], [1, 2, 3]]])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_what_would_lose_information_is_refused(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=f"mode {mode}(.|\n)*a.png"):
        decode_image(tmp_path / "a.png")


@settings(max_examples=150, deadline=None)
@given(draw=st.data())
def test_no_damage_escapes_as_another_error(tmp_path_factory, draw):
    """Whatever the bytes, the answer is pixels or a DataError with the path."""
    kind = draw.draw(st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"]))
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    content = bytearray(stream.getvalue())
    head = st.integers(0, min(200, len(content)) - 1)
    for _ in range(draw.draw(st.integers(1, 4))):
        content[draw.draw(head)] = draw.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{kind}"
    path.write_bytes(content[: draw.draw(st.integers(0, len(content)))])
    with warnings.catch_warnings(), contextlib.suppress(DataError):
        warnings.simplefilter("ignore")  # Pillow warns about what it then fails on
        assert decode_image(path).dtype == np.uint8


def test_decode_images_wants_as_many_paths_as_places(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        decode_images([], np.zeros((1, 3, 4, 5), np.uint8))


# ------------------------------------------------------------------------------ scaling


def test_unit_scaling_is_the_plain_line():
    values = np.random.default_rng(2).integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)
    source = make_source(train_values=values[:4], test_values=values[4:], full_scale=255.0)
    dataset = scale_inputs(source, "unit")
    plain = values.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(dataset.train_inputs, plain[:4], strict=True)
    np.testing.assert_array_equal(dataset.test_inputs, plain[4:], strict=True)
    np.testing.assert_array_equal(dataset.train_labels, source.train_labels, strict=True)
    assert dataset.train_inputs.flags.c_contiguous


@pytest.mark.parametrize("block_bytes", [1, 1000, 2**25])
@pytest.mark.parametrize(("shape", "axes"), [((3, 4, 5), (0, 2, 3)), ((4, 5), 0), ((7,), 0)])
def test_standard_scaling_against_float64(monkeypatch, block_bytes, shape, axes):
    monkeypatch.setattr(data, "_BLOCK_BYTES", block_bytes)
    values = np.random.default_rng(3).integers(0, 256, (40, *shape), dtype=np.uint8)
    labels = np.zeros(40, np.int64)
    source = make_source(
        train_values=values[:30],
        train_labels=labels[:30],
        test_values=values[30:],
        test_labels=labels[30:],
        full_scale=255.0,
    )
    dataset = scale_inputs(source, "standard")
    plain = values / 255
    mean = plain[:30].mean(axis=axes, keepdims=True)
    deviation = plain[:30].std(axis=axes, keepdims=True)
    expected = (plain - mean) / deviation
    np.testing.assert_allclose(dataset.train_inputs, expected[:30], atol=2e-6)
    np.testing.assert_allclose(dataset.test_inputs, expected[30:], atol=2e-6)
    assert dataset.train_inputs.dtype == np.float32
    np.testing.assert_array_equal(source.train_values, values[:30])  # the source is untouched


def test_a_constant_feature_becomes_zero():
    values = np.full((4, 3), 0.1, np.float32)
    values[:, 1] = [1, 2, 3, 4]
    source = make_source(train_values=values, test_values=values[:2])
    dataset = scale_inputs(source, "standard")
    assert not dataset.train_inputs[:, [0, 2]].any()
    # Mean 2.5, deviation sqrt(5/4) = 1.1180340: 1.5 / 1.1180340 = 1.3416408.
    np.testing.assert_allclose(dataset.train_inputs[3, 1], 1.3416408, rtol=1e-6)


def test_float_inputs_are_not_aliased():
    source = make_source()
    scale_inputs(source, "unit").train_inputs[0] = 99
    assert source.train_values[0, 0] == 0


def test_unknown_scaling():
    with pytest.raises(ConfigError, match="unit, standard"):
        scale_inputs(make_source(), "standart")


def test_load_dataset_is_load_and_scale():
    loaded = load_dataset("digits", scaling="standard")
    scaled = scale_inputs(load_source("digits"), "standard")
    for one, other in zip(loaded, scaled, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


# ----------------------------------------------------------------------------- imports


def test_no_heavy_import():
    """Workers that decode import this module: it must bring neither torch nor a store."""
    code = "import sys, json, sampimp.data.names; print(json.dumps(sorted(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parents[2])}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True, env=environment
    ).stdout
    assert not {"torch", "ray", "zarr", "sklearn", "pooch", "xarray"} & set(json.loads(out))


# --------------------------------------------------------------------------- real files

REAL = os.environ.get("SAMPIMP_DATA", "")


@pytest.mark.skipif(
    not (Path(REAL) / "mnist").is_dir() or not REAL, reason="SAMPIMP_DATA has no mnist/"
)
def test_real_mnist():
    source = load_source("mnist", REAL)
    assert source.train_values.shape == (50_000, 1, 28, 28)
    assert source.test_values.shape == (10_000, 1, 28, 28)
    # The first five labels of MNIST, as everyone has seen them: 5 0 4 1 9; of its test set: 7 2 1.
    np.testing.assert_array_equal(source.train_labels[:5], [5, 0, 4, 1, 9])
    np.testing.assert_array_equal(source.test_labels[:3], [7, 2, 1])
