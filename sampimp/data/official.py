"""MNIST and CIFAR-10: the official files, their checksums, and where to download them.

Official files are checked by their MD5 wherever they come from: a truncated or repacked file would
train without an error and give numbers that belong to no known data set. The splits are those of
the paper (section 3): MNIST 50,000/10,000, the first 50,000 training images, and CIFAR-10
50,000/10,000.

Map: `OfficialFile`, `MNIST_FILES`, `CIFAR10_FILES` (the published files); `load_mnist`,
`load_cifar10`; `read_mnist_file` (the checked bytes of one file).
"""

import gzip
import hashlib
import os
import pickle
import tarfile
import textwrap
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sampimp.data.source import Source
from sampimp.errors import DataError, require_package

MNIST_TRAIN = 50_000
"""Training images of MNIST that are used: the first 50,000 of 60,000 (section 3)."""


class OfficialFile(NamedTuple):
    """A file as its authors publish it; `md5` and `size` (bytes) are those after decompression."""

    md5: str
    size: int | None = None
    gz_md5: str = ""


MNIST_FILES: Mapping[str, OfficialFile] = {
    "train-images-idx3-ubyte": OfficialFile(
        "6bbc9ace898e44ae57da46a324031adb", 47_040_016, "f68b3c2dcbeaaa9fbdd348bbdeb94873"
    ),
    "train-labels-idx1-ubyte": OfficialFile(
        "a25bea736e30d166cdddb491f175f624", 60_008, "d53e105ee54ea40749a09fcbcd1e9432"
    ),
    "t10k-images-idx3-ubyte": OfficialFile(
        "2646ac647ad5339dbf082846283269ea", 7_840_016, "9fb629c4189551a2d022fa330f9573f3"
    ),
    "t10k-labels-idx1-ubyte": OfficialFile(
        "27ae3e4e09519cfbb04c329615203637", 10_008, "ec29112dd5afa0611ce80d1b7f02629c"
    ),
}
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

CIFAR10_ARCHIVE = OfficialFile("c58f30108f718f92721af3b95e74349a", 170_498_071)
"""The compressed archive; its MD5 is that of the .tar.gz file itself."""
CIFAR10_MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)
CIFAR10_FILES: Mapping[str, OfficialFile] = {
    "data_batch_1": OfficialFile("c99cafc152244af753f735de768cd75f"),
    "data_batch_2": OfficialFile("d4bba439e000b95fd0a9bffe97cbabec"),
    "data_batch_3": OfficialFile("54ebc095f3ab1f0389bbae665268c751"),
    "data_batch_4": OfficialFile("634d18415352ddfa80567beed471001a"),
    "data_batch_5": OfficialFile("482c414d41f54cd18b22e5b47cb7c3cb"),
    "test_batch": OfficialFile("40351d587109b95175f43aff81a1287e"),
}
_CIFAR10_ARCHIVE_NAME = "cifar-10-python.tar.gz"
_CIFAR10_FOLDER = "cifar-10-batches-py"
_CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


# ------------------------------------------------------------------------------ MNIST


def load_mnist(data_dir: str | os.PathLike[str] | None = None) -> Source:
    """Return MNIST, from files under `data_dir`, under SAMPIMP_DATA, or downloaded.

    Raises
    ------
    DataError
        A file is missing and cannot be downloaded, or is not the official one.
    """
    train, train_labels, test, test_labels = (
        _parse_idx(read_mnist_file(file, data_dir)) for file in MNIST_FILES
    )
    return Source(
        name="mnist",
        train_values=train[:MNIST_TRAIN, None],
        train_labels=train_labels[:MNIST_TRAIN].astype(np.int64),
        test_values=test[:, None],
        test_labels=test_labels.astype(np.int64),
        full_scale=255.0,
        class_names=tuple(map(str, range(10))),
    )


def read_mnist_file(file: str, data_dir: str | os.PathLike[str] | None = None) -> bytes:
    """Return the checked and decompressed bytes of one of `MNIST_FILES`.

    Parameters
    ----------
    file
        A key of `MNIST_FILES`.
    data_dir
        As in `sampimp.data.load_source`.

    Raises
    ------
    DataError
        The file is missing and cannot be downloaded, or is not the official one.
    """
    official = MNIST_FILES[file]
    folder = _data_folder(data_dir)
    homes = ("mnist", "MNIST/raw", ".")
    path = _find(folder, [f"{home}/{file}{end}" for home in homes for end in ("", ".gz")])
    if path is None:
        urls = [f"{mirror}{file}.gz" for mirror in MNIST_MIRRORS]
        path = _download(urls, official.gz_md5, folder, "mnist")
    content, where = path.read_bytes(), str(path)
    # By content, not by name: some browsers decompress a file and keep its name.
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                expected=f"a gzip file of {official.size:,} bytes, MD5 {official.md5}, unpacked",
                got=f"a damaged gzip file of {len(content):,} bytes ({error})",
                where=str(path),
                todo="remove the file, to have it downloaded again, or copy it again from its "
                "source",
            ) from None
        where += ", unpacked"
    _check_official(content, official, where)
    return content


def _parse_idx(content: bytes) -> np.ndarray:
    """Return the uint8 array of an IDX file: 0, 0, type 8, the rank, big-endian sizes, values.

    Examples
    --------
    >>> _parse_idx(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 2, 7, 9]))
    array([[7, 9]], dtype=uint8)
    """
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


# --------------------------------------------------------------------------- CIFAR-10


def load_cifar10(data_dir: str | os.PathLike[str] | None = None) -> Source:
    """Return CIFAR-10, from files under `data_dir`, under SAMPIMP_DATA, or downloaded.

    Raises
    ------
    DataError
        A file is missing and cannot be downloaded, or is not the official one.
    """
    values, labels = {}, {}
    for file, content in _read_cifar10(_data_folder(data_dir)).items():
        with warnings.catch_warnings():
            # The official pickles hold `dtype("u1", 0, 1)`, deprecated by NumPy 2.4.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            batch = pickle.loads(content, encoding="bytes")  # safe: the MD5 was checked
        values[file] = batch[b"data"].reshape(-1, 3, 32, 32)
        labels[file] = np.array(batch[b"labels"], dtype=np.int64)
    train = [file for file in CIFAR10_FILES if file != "test_batch"]
    return Source(
        name="cifar10",
        train_values=np.concatenate([values[file] for file in train]),
        train_labels=np.concatenate([labels[file] for file in train]),
        test_values=values["test_batch"],
        test_labels=labels["test_batch"],
        full_scale=255.0,
        class_names=_CIFAR10_CLASSES,
    )


def _read_cifar10(folder: Path | None) -> dict[str, bytes]:
    """Return the checked bytes of the six batches, from the directory or else from the archive."""
    homes = ("cifar10", ".")
    names = (_CIFAR10_FOLDER, _CIFAR10_ARCHIVE_NAME)
    path = _find(folder, [f"{home}/{name}" for home in homes for name in names])
    if path is None:
        urls = [f"{mirror}{_CIFAR10_ARCHIVE_NAME}" for mirror in CIFAR10_MIRRORS]
        path = _download(urls, CIFAR10_ARCHIVE.md5, folder, "cifar10")
    batches = {}
    if path.is_dir():
        for file in CIFAR10_FILES:
            if not (path / file).is_file():
                raise DataError(
                    expected=f"the six files {', '.join(CIFAR10_FILES)}",
                    got=f"no {file}",
                    where=str(path),
                    todo=f"unpack {_CIFAR10_ARCHIVE_NAME} again",
                )
            batches[file] = (path / file).read_bytes()
    else:
        _check_official(path.read_bytes(), CIFAR10_ARCHIVE, str(path))
        with tarfile.open(path) as archive:
            for member in archive:
                file = member.name.rpartition("/")[2]
                content = archive.extractfile(member) if file in CIFAR10_FILES else None
                if content is not None:
                    batches[file] = content.read()
    for file, official in CIFAR10_FILES.items():
        _check_official(batches[file], official, f"{path}, {file}")
    return batches


# ------------------------------------------------------------ find, download and check


def _data_folder(data_dir: str | os.PathLike[str] | None) -> Path | None:
    """Return the directory to search for official files; None if the user names none."""
    chosen = data_dir or os.environ.get("SAMPIMP_DATA")
    if not chosen:
        return None
    folder = Path(os.path.abspath(os.path.expanduser(chosen)))
    if not folder.is_dir():
        raise DataError(
            expected="a folder of data sets",
            got="no such folder",
            where=f"{folder} ({'data_dir' if data_dir else 'SAMPIMP_DATA'})",
            todo="correct the path, or leave it out to have the data downloaded",
        )
    return folder


def _find(folder: Path | None, names: Iterable[str]) -> Path | None:
    """Return the first of the names that exists in the folder."""
    if folder is None:
        return None
    return next((folder / name for name in names if (folder / name).exists()), None)


def _download(urls: Sequence[str], md5: str, folder: Path | None, home: str) -> Path:
    """Return the path of a file in the user's cache, downloaded from the first URL that works.

    `home` is the subfolder of a data folder where the file was searched; the error message names
    it.
    """
    require_package("pooch", "study")
    import pooch

    cache = pooch.os_cache("sampimp")
    reasons = []
    for url in urls:
        try:
            path = pooch.retrieve(
                url, f"md5:{md5}", fname=url.rpartition("/")[2], path=cache, progressbar=True
            )
            return Path(path)
        # requests raises subclasses of OSError, pooch a ValueError for a wrong checksum.
        except (OSError, ValueError) as error:
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            reasons.append(f"{url}: {reason}")
    searched = "SAMPIMP_DATA is not set" if folder is None else f"not under {folder}"
    raise DataError(
        expected=f"the file {urls[0].rpartition('/')[2]} on disk or from the network",
        got=f"no file ({searched}) and no download:\n         " + "\n         ".join(reasons),
        where=f"the cache {cache}",
        todo="connect this machine to the internet and run again, or download "
        f"{urls[0]} elsewhere, put it into "
        f"DIR/{home} and set SAMPIMP_DATA=DIR",
    )


def _check_official(content: bytes, official: OfficialFile, where: str) -> None:
    """Raise DataError unless the bytes are the official ones."""
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != official.md5:
        size = "" if official.size is None else f"{official.size:,} bytes, "
        raise DataError(
            expected=f"the official file: {size}MD5 {official.md5}",
            got=f"{len(content):,} bytes, MD5 {md5}",
            where=where,
            todo="remove the file, to have it downloaded again, or copy it again from its source",
        )
