"""Official files are read in every layout, checked by their MD5, and downloaded once."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from sampimp.data import Source, load_source, official
from sampimp.errors import DataError

REAL_DATA = os.environ.get("SAMPIMP_DATA", "")


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


# ------------------------------------------------------------------------------ MNIST


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def tiny_mnist(monkeypatch):
    """Replace MNIST by 7 training images, of which 5 are used, and 3 test images."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (7, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.array([3, 1, 4, 1, 5, 9, 2], dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.array([5, 3, 1], dtype=np.uint8),
    }
    packed = {name: gzip.compress(idx(array), mtime=0) for name, array in arrays.items()}
    files = {
        name: official.OfficialFile(md5(idx(array)), len(idx(array)), md5(packed[name]))
        for name, array in arrays.items()
    }
    monkeypatch.setattr(official, "MNIST_FILES", files)
    monkeypatch.setattr(official, "MNIST_TRAIN", 5)
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
def test_mnist_is_read_from_disk(tiny_mnist, tmp_path, monkeypatch, home, packed):
    arrays, _ = tiny_mnist
    (tmp_path / home).mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        # Compressed differently from the mirrors' files: only the content has to be official.
        content = gzip.compress(idx(array), compresslevel=1, mtime=7) if packed else idx(array)
        (tmp_path / home / f"{name}{'.gz' if packed else ''}").write_bytes(content)
    check_tiny_mnist(load_source("mnist", tmp_path), arrays)
    monkeypatch.setenv("SAMPIMP_DATA", str(tmp_path))
    check_tiny_mnist(load_source("mnist"), arrays)


@pytest.mark.parametrize("damage", ["truncated gz", "truncated", "other bytes", "empty"])
def test_error_names_the_damaged_mnist_file(tiny_mnist, tmp_path, damage):
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
    # 16 bytes of header and 3 images of 28 x 28 make 2,368 bytes.
    assert str(victim) in message
    assert "2,368 bytes" in message
    assert md5(good) in message
    got = {"truncated gz": len(content), "truncated": 2268, "other bytes": 2368, "empty": 0}[damage]
    assert f"{got:,} bytes" in caught.value.got
    assert "remove the file" in caught.value.todo


def test_missing_data_folder_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no such folder\n.*nowhere \(data_dir\)"):
        load_source("mnist", tmp_path / "nowhere")
    monkeypatch.setenv("SAMPIMP_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere \(SAMPIMP_DATA\)"):
        load_source("cifar10")


@pytest.mark.skipif(
    not (Path(REAL_DATA) / "mnist").is_dir() or not REAL_DATA, reason="SAMPIMP_DATA has no mnist/"
)
def test_shapes_and_labels_of_the_real_mnist():
    source = load_source("mnist", REAL_DATA)
    assert source.train_values.shape == (50_000, 1, 28, 28)
    assert source.test_values.shape == (10_000, 1, 28, 28)
    # The well-known first labels of MNIST: 5 0 4 1 9; of its test set: 7 2 1.
    np.testing.assert_array_equal(source.train_labels[:5], [5, 0, 4, 1, 9])
    np.testing.assert_array_equal(source.test_labels[:3], [7, 2, 1])


# --------------------------------------------------------------------------- download


class QuietBar:
    """Replaces tqdm, which pooch requires and the tests do not need."""

    def __init__(self, **_):
        self.total = 0

    def update(self, _):
        pass

    reset = close = lambda self: None


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Yield the folder of a server on loopback, and the list of its requests."""
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
        # The first mirror refuses connections, so the second one serves the file.
        monkeypatch.setattr(official, "MNIST_MIRRORS", ("http://127.0.0.1:9/", url))
        monkeypatch.setattr(official, "CIFAR10_MIRRORS", (url,))
        yield folder, requests
        server.shutdown()


def test_mnist_is_downloaded_once(tiny_mnist, mirror):
    arrays, packed = tiny_mnist
    folder, requests = mirror
    for name, content in packed.items():
        (folder / f"{name}.gz").write_bytes(content)
    check_tiny_mnist(load_source("mnist"), arrays)
    assert len(requests) == 4
    check_tiny_mnist(load_source("mnist"), arrays)
    assert len(requests) == 4


def test_download_with_a_wrong_checksum_is_refused(tiny_mnist, mirror):
    _, packed = tiny_mnist
    folder, _ = mirror
    for name in packed:
        (folder / f"{name}.gz").write_bytes(gzip.compress(b"<html>log in first</html>"))
    with pytest.raises(DataError, match="hash"):
        load_source("mnist")


@pytest.mark.parametrize(("name", "home"), [("mnist", "mnist"), ("cifar10", "cifar10")])
def test_error_without_files_and_network_says_where_to_put_them(name, home, tmp_path, monkeypatch):
    monkeypatch.setattr("pooch.downloaders.tqdm", QuietBar)
    with pytest.raises(DataError) as caught:
        load_source(name, tmp_path)
    assert f"not under {tmp_path}" in caught.value.got
    assert "ConnectionError" in caught.value.got
    assert "http://127.0.0.1:9/" in caught.value.todo
    assert f"DIR/{home}" in caught.value.todo
    assert "SAMPIMP_DATA=DIR" in caught.value.todo
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


# --------------------------------------------------------------------------- CIFAR-10


class OldDtype:
    """Is pickled as the `dtype("u1", 0, 1)` of the official files, which NumPy 2.4 deprecates."""

    def __reduce__(self):
        return np.dtype, ("u1", 0, 1)


@pytest.fixture
def tiny_cifar10(monkeypatch):
    """Six batches of two images; a pixel's value encodes batch, image and channel."""
    batches = {}
    for number, name in enumerate(official.CIFAR10_FILES):
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
    files = {name: official.OfficialFile(md5(content)) for name, content in batches.items()}
    monkeypatch.setattr(official, "CIFAR10_FILES", files)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in {"readme.html": b"hello", **batches}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    packed = stream.getvalue()
    monkeypatch.setattr(
        official, "CIFAR10_ARCHIVE", official.OfficialFile(md5(packed), len(packed))
    )
    return batches, packed


def check_tiny_cifar10(source: Source) -> None:
    assert source.train_values.shape == (10, 3, 32, 32)
    assert source.test_values.shape == (2, 3, 32, 32)
    # Values: 100 image + 10 channel + batch, for batches 0 to 4 and channel 1.
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
def test_cifar10_is_read_from_disk(tiny_cifar10, tmp_path, home, packed):
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


def test_cifar10_is_downloaded_once(tiny_cifar10, mirror):
    _, archive = tiny_cifar10
    folder, requests = mirror
    (folder / "cifar-10-python.tar.gz").write_bytes(archive)
    check_tiny_cifar10(load_source("cifar10"))
    check_tiny_cifar10(load_source("cifar10"))
    assert len(requests) == 1


def test_error_names_the_damaged_cifar10_file(tiny_cifar10, tmp_path):
    batches, archive = tiny_cifar10
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive[:-9])
    with pytest.raises(DataError, match=rf"{len(archive):,} bytes(.|\n)*cifar-10-python.tar.gz"):
        load_source("cifar10", tmp_path)
    folder = tmp_path / "cifar-10-batches-py"  # takes precedence over the archive beside it
    folder.mkdir()
    for name, content in batches.items():
        (folder / name).write_bytes(content)
    (folder / "data_batch_3").write_bytes(b"not a pickle")
    with pytest.raises(DataError, match=r"12 bytes(.|\n)*data_batch_3"):
        load_source("cifar10", tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="no data_batch_3"):
        load_source("cifar10", tmp_path)
