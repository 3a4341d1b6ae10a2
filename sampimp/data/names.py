"""The training sets: MNIST, CIFAR-10, a small one for tests, and the user's own.

A data set has two forms. A `Source` holds the values as stored (bytes of pixels, say), proved by
its `digest`; a `Dataset` holds what training sees: float32, scaled. The position of a sample in the
training set is its permanent index, the `sample` coordinate of every record. Official files are
checked by their MD5 wherever they come from, because a truncated or repacked file would otherwise
train without complaint and give numbers that belong to no known data set. The splits are those of
the paper's section 3: MNIST 50,000/10,000 (the first 50,000 training images) and CIFAR-10
50,000/10,000.

Map: `dataset_key` (a short name), `load_source` (find or fetch, check), `Source`; `list_images`,
`decode_image`, `decode_images`, `images_source` (folders of images, whoever decodes them);
`scale_inputs`, `Dataset`, `load_dataset` (what training sees).
"""

import difflib
import gzip
import hashlib
import os
import pickle
import re
import tarfile
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from sampimp.errors import ConfigError, DataError
from sampimp.schema import digest

DATASETS = ("mnist", "cifar10", "digits")
"""The data sets known by name; `folder:PATH` and `npz:PATH` are the user's own."""

Scaling = Literal["unit", "standard"]

MNIST_TRAIN = 50_000
"""Training images of MNIST that are used: the first 50,000 of 60,000 (section 3)."""

DIGITS_TEST = 297
"""Test images of `digits`: arbitrary, the rest is a round 1,500."""

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""What counts as an image in a class folder, whatever the case of the letters."""


class _Official(NamedTuple):
    """A file as its authors publish it; `md5` and `size` are those of the unpacked bytes."""

    md5: str
    size: int | None = None
    gz_md5: str = ""


_MNIST: Mapping[str, _Official] = {
    "train-images-idx3-ubyte": _Official(
        "6bbc9ace898e44ae57da46a324031adb", 47_040_016, "f68b3c2dcbeaaa9fbdd348bbdeb94873"
    ),
    "train-labels-idx1-ubyte": _Official(
        "a25bea736e30d166cdddb491f175f624", 60_008, "d53e105ee54ea40749a09fcbcd1e9432"
    ),
    "t10k-images-idx3-ubyte": _Official(
        "2646ac647ad5339dbf082846283269ea", 7_840_016, "9fb629c4189551a2d022fa330f9573f3"
    ),
    "t10k-labels-idx1-ubyte": _Official(
        "27ae3e4e09519cfbb04c329615203637", 10_008, "ec29112dd5afa0611ce80d1b7f02629c"
    ),
}
_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

_CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
_CIFAR10_TAR = _Official("c58f30108f718f92721af3b95e74349a", 170_498_071)
_CIFAR10_MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)
_CIFAR10_FOLDER = "cifar-10-batches-py"
_CIFAR10: Mapping[str, _Official] = {
    "data_batch_1": _Official("c99cafc152244af753f735de768cd75f"),
    "data_batch_2": _Official("d4bba439e000b95fd0a9bffe97cbabec"),
    "data_batch_3": _Official("54ebc095f3ab1f0389bbae665268c751"),
    "data_batch_4": _Official("634d18415352ddfa80567beed471001a"),
    "data_batch_5": _Official("482c414d41f54cd18b22e5b47cb7c3cb"),
    "test_batch": _Official("40351d587109b95175f43aff81a1287e"),
}
_CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

_TEN_DIGITS = tuple(str(digit) for digit in range(10))

_BLOCK_BYTES = 2**25
"""Work on many samples is cut into blocks of 32 MiB: arbitrary, small against any data set."""


# ------------------------------------------------------------------------------ names


def _split_name(name: str) -> tuple[str, Path]:
    """Return the kind of a data set (a name of `DATASETS`, "folder", "npz") and its path."""
    if name in DATASETS:
        return name, Path()
    kind, _, path = name.partition(":")
    if kind in ("folder", "npz") and path:
        return kind, Path(os.path.abspath(os.path.expanduser(path)))
    if name.endswith(".npz"):
        nearest = f"npz:{name}"
    elif Path(name).is_dir():
        nearest = f"folder:{name}"
    else:
        known = [*DATASETS, "folder:PATH", "npz:PATH"]
        nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
    raise ConfigError(
        expected=f"a data set: {', '.join(DATASETS)}, folder:PATH or npz:PATH",
        got=repr(name),
        where="the name of the data set",
        todo=f"did you mean {nearest!r}?",
    )


def dataset_key(name: str) -> str:
    """Return the short name of a data set, for nodes of the cube and identifiers of trials.

    Parameters
    ----------
    name
        One of `DATASETS`, `folder:PATH` or `npz:PATH`.

    Raises
    ------
    ConfigError
        If the name is unknown; the nearest one is suggested.

    Examples
    --------
    >>> dataset_key("mnist"), dataset_key("folder:/x/cifar10"), dataset_key("npz:/x/my data.npz")
    ('mnist', 'folder-cifar10', 'npz-my_data')
    """
    kind, path = _split_name(name)
    if kind in DATASETS:
        return kind
    stem = path.stem if kind == "npz" else path.name
    return f"{kind}-{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)}"


# ----------------------------------------------------------------------------- source


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """A data set as stored, before scaling; checked on construction.

    Attributes
    ----------
    name
        As in `load_source`.
    train_values, test_values
        uint8 or float32, [N, ...]; images are [N, C, H, W].
    train_labels, test_labels
        int64 [N], each in 0..classes-1.
    full_scale
        The stored value that "unit" scaling maps to 1: 255 for 8-bit images, 16 for `digits`, 1 for
        float inputs.
    class_names
        The name of each label.

    Raises
    ------
    DataError
        If lengths or shapes differ, a set is empty, an input is NaN or infinite, a label is no
        integer or out of range, or a class of the test set has no training sample.
    """

    name: str
    train_values: np.ndarray
    train_labels: np.ndarray
    test_values: np.ndarray
    test_labels: np.ndarray
    full_scale: float
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_part(self.name, "train", self.train_values, self.train_labels, len(self.class_names))
        _check_part(self.name, "test", self.test_values, self.test_labels, len(self.class_names))
        train, test = self.train_values, self.test_values
        if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
            raise DataError(
                expected="test inputs of the shape and type of the training inputs, "
                f"{train.dtype} {train.shape[1:]}",
                got=f"{test.dtype} {test.shape[1:]}",
                where=f"data set {self.name}",
                todo="prepare both parts in the same way",
            )
        unseen = np.setdiff1d(self.test_labels, self.train_labels)
        if unseen.size:
            names = ", ".join(self.class_names[label] for label in unseen[:5])
            raise DataError(
                expected="a training sample of every class of the test set",
                got=f"no training sample of {unseen.size} of its classes: {names}",
                where=f"data set {self.name}",
                todo="add training samples of these classes, or take them out of the test set",
            )

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the four arrays and of `full_scale`."""
        return digest(
            self.train_values,
            self.train_labels,
            self.test_values,
            self.test_labels,
            np.array([self.full_scale]),
        )


def _check_part(name: str, part: str, values: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """Raise DataError unless inputs and labels of one part can be trained on."""

    def error(expected: str, got: str, todo: str) -> DataError:
        return DataError(expected, got, f"data set {name}, {part} set", todo)

    if values.dtype not in (np.uint8, np.float32) or values.ndim < 2 or not values[:1].size:
        raise error(
            expected="uint8 or float32 inputs [N, ...] of at least one sample and one feature",
            got=f"{values.dtype} {list(values.shape)}",
            todo="one row per sample; save numbers other than uint8 as float32",
        )
    if labels.dtype != np.int64 or labels.ndim != 1:
        raise error(
            expected="integer labels [N]",
            got=f"{labels.dtype} {list(labels.shape)}",
            todo="one whole number per sample (not one-hot, not a float), saved as int64",
        )
    if len(values) != len(labels):
        raise error(
            expected="one label for each input",
            got=f"{len(values):,} inputs and {len(labels):,} labels",
            todo="save inputs and labels of the same samples",
        )
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        raise error(
            expected=f"labels in 0..{classes - 1}",
            got=f"{labels[outside[0]]} at sample {outside[0]} ({outside.size:,} out of range)",
            todo="number the classes from 0",
        )
    bad = np.zeros(1, bool) if values.dtype == np.uint8 else ~np.isfinite(values)
    if bad.any():
        first = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        raise error(
            expected="finite inputs, within the range of float32",
            got=f"{values[first]} at sample {first[0]}, position {list(first[1:])} "
            f"({np.count_nonzero(bad):,} such values)",
            todo="mend or remove these samples",
        )


# ---------------------------------------------------------------- find, fetch, load


def load_source(name: str, data_dir: str | os.PathLike[str] | None = None) -> Source:
    """Return a data set as stored, found on disk or fetched.

    Official files are searched under `data_dir` (else the environment variable SAMPIMP_DATA), and
    fetched into the user's cache if they are not there. They are checked by their MD5 either way.

    Parameters
    ----------
    name
        "mnist" (the first 50,000 training images, 10,000 test), "cifar10", "digits" (1,797 images
        of 8x8 that come with scikit-learn, split into 1,500 and 297), `folder:PATH` with
        PATH/{train,test}/CLASS/IMAGE, or `npz:PATH` with the arrays train_inputs, train_labels,
        test_inputs and test_labels.
    data_dir
        Where the official files are: DIR, DIR/mnist, DIR/MNIST/raw or DIR/cifar10, packed or not.

    Raises
    ------
    ConfigError
        If the name is unknown.
    DataError
        If files are missing and cannot be fetched, are damaged, or cannot be trained on.
    """
    kind, path = _split_name(name)
    if kind == "digits":
        return _load_digits()
    if kind == "npz":
        return _load_npz(name, path)
    if kind == "folder":
        images = list_images(path)
        return images_source(name, images, _decode_with_threads(images))
    return (_load_mnist if kind == "mnist" else _load_cifar10)(_data_folder(data_dir))


def _data_folder(data_dir: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder to search for official files, None if there is none to search."""
    given = data_dir or os.environ.get("SAMPIMP_DATA")
    if not given:
        return None
    folder = Path(os.path.abspath(os.path.expanduser(given)))
    if not folder.is_dir():
        raise DataError(
            expected="a folder of data sets",
            got="no such folder",
            where=f"{folder} ({'data_dir' if data_dir else 'SAMPIMP_DATA'})",
            todo="correct the path, or leave it out to have the data fetched",
        )
    return folder


def _find(folder: Path | None, names: Iterable[str]) -> Path | None:
    """Return the first of the names that exists under the folder."""
    if folder is None:
        return None
    return next((folder / name for name in names if (folder / name).exists()), None)


def _fetch(urls: Sequence[str], md5: str, folder: Path | None, home: str) -> Path:
    """Return the path in the user's cache of a file, fetched from the first URL that works.

    `home` is the folder, inside a folder of data sets, in which the file would have been found.
    """
    import pooch

    cache = pooch.os_cache("sampimp")
    reasons = []
    for url in urls:
        try:
            found = pooch.retrieve(
                url, f"md5:{md5}", fname=url.rpartition("/")[2], path=cache, progressbar=True
            )
            return Path(found)
        except (
            OSError,
            ValueError,
        ) as error:  # requests' errors are OSError, a bad hash ValueError
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            reasons.append(f"{url}: {reason}")
    searched = "SAMPIMP_DATA is not set" if folder is None else f"not under {folder}"
    raise DataError(
        expected=f"the file {urls[0].rpartition('/')[2]} on disk or from the network",
        got=f"no file ({searched}) and no download:\n         " + "\n         ".join(reasons),
        where=f"the cache {cache}",
        todo=f"connect this machine and run again, or download {urls[0]} elsewhere, put it into "
        f"DIR/{home} and set SAMPIMP_DATA=DIR",
    )


def _check_official(content: bytes, official: _Official, where: str) -> None:
    """Raise DataError unless the bytes are the official ones."""
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != official.md5:
        size = "" if official.size is None else f"{official.size:,} bytes, "
        raise DataError(
            expected=f"the official file: {size}MD5 {official.md5}",
            got=f"{len(content):,} bytes, MD5 {md5}",
            where=where,
            todo="remove the file, to have it fetched again, or copy it again from its source",
        )


def _read_mnist(folder: Path | None, file: str) -> bytes:
    """Return the official bytes of an IDX file, unpacked."""
    official = _MNIST[file]
    homes = ("mnist", "MNIST/raw", ".")
    path = _find(folder, [f"{home}/{file}{end}" for home in homes for end in ("", ".gz")])
    if path is None:
        urls = [f"{mirror}{file}.gz" for mirror in _MNIST_MIRRORS]
        path = _fetch(urls, official.gz_md5, folder, "mnist")
    content, where = path.read_bytes(), str(path)
    if content.startswith(b"\x1f\x8b"):  # by content: some browsers unpack but keep the name
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                expected=f"a gzip file of {official.size:,} bytes, MD5 {official.md5}, unpacked",
                got=f"a damaged gzip file of {len(content):,} bytes ({error})",
                where=str(path),
                todo="remove the file, to have it fetched again, or copy it again from its source",
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


def _load_mnist(folder: Path | None) -> Source:
    train, train_labels, test, test_labels = (
        _parse_idx(_read_mnist(folder, file)) for file in _MNIST
    )
    return Source(
        name="mnist",
        train_values=train[:MNIST_TRAIN, None],
        train_labels=train_labels[:MNIST_TRAIN].astype(np.int64),
        test_values=test[:, None],
        test_labels=test_labels.astype(np.int64),
        full_scale=255.0,
        class_names=_TEN_DIGITS,
    )


def _read_cifar10(folder: Path | None) -> dict[str, bytes]:
    """Return the official bytes of the six batches of CIFAR-10."""
    homes = ("cifar10", ".")
    names = [f"{home}/{name}" for home in homes for name in (_CIFAR10_FOLDER, _CIFAR10_ARCHIVE)]
    path = _find(folder, names)
    if path is None:
        urls = [f"{mirror}{_CIFAR10_ARCHIVE}" for mirror in _CIFAR10_MIRRORS]
        path = _fetch(urls, _CIFAR10_TAR.md5, folder, "cifar10")
    batches = {}
    if path.is_dir():
        for file in _CIFAR10:
            if not (path / file).is_file():
                raise DataError(
                    expected=f"the six files {', '.join(_CIFAR10)}",
                    got=f"no {file}",
                    where=str(path),
                    todo=f"unpack {_CIFAR10_ARCHIVE} again",
                )
            batches[file] = (path / file).read_bytes()
    else:
        _check_official(path.read_bytes(), _CIFAR10_TAR, str(path))
        with tarfile.open(path) as archive:
            for member in archive:
                file = member.name.rpartition("/")[2]
                content = archive.extractfile(member) if file in _CIFAR10 else None
                if content is not None:
                    batches[file] = content.read()
    for file, official in _CIFAR10.items():
        _check_official(batches[file], official, f"{path}, {file}")
    return batches


def _load_cifar10(folder: Path | None) -> Source:
    values, labels = {}, {}
    for file, content in _read_cifar10(folder).items():
        with warnings.catch_warnings():
            # The official pickles hold `dtype("u1", 0, 1)`, deprecated by NumPy 2.4.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            batch = pickle.loads(content, encoding="bytes")  # its MD5 is known: not just any pickle
        values[file] = batch[b"data"].reshape(-1, 3, 32, 32)
        labels[file] = np.array(batch[b"labels"], dtype=np.int64)
    train = [file for file in _CIFAR10 if file != "test_batch"]
    return Source(
        name="cifar10",
        train_values=np.concatenate([values[file] for file in train]),
        train_labels=np.concatenate([labels[file] for file in train]),
        test_values=values["test_batch"],
        test_labels=labels["test_batch"],
        full_scale=255.0,
        class_names=_CIFAR10_CLASSES,
    )


def _load_digits() -> Source:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = values.astype(np.uint8).reshape(-1, 1, 8, 8)
    # Every sixth or so of the images sorted by class: stratified, and fixed without a generator.
    by_class = np.argsort(labels, kind="stable")
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class[np.arange(DIGITS_TEST) * len(labels) // DIGITS_TEST]] = True
    return Source(
        name="digits",
        train_values=images[~is_test],
        train_labels=labels[~is_test].astype(np.int64),
        test_values=images[is_test],
        test_labels=labels[is_test].astype(np.int64),
        full_scale=16.0,
        class_names=_TEN_DIGITS,
    )


def _load_npz(name: str, path: Path) -> Source:
    if not path.is_file():
        raise _npz_error(path, "no such file")
    size = f"{path.stat().st_size:,} bytes"
    if not zipfile.is_zipfile(path):
        raise _npz_error(path, f"{size} that are no .npz archive, or not all of it")
    keys = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    try:
        with np.load(path, allow_pickle=False) as file:
            if any(key not in file for key in keys):
                raise _npz_error(path, f"the arrays {', '.join(file) or '(none)'}")
            train, train_labels, test, test_labels = (file[key] for key in keys)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise _npz_error(path, f"{size} that NumPy cannot read: {error}") from None
    train, test = _as_values(train), _as_values(test)
    train_labels, test_labels = _as_labels(train_labels), _as_labels(test_labels)
    tops = [int(labels.max()) for labels in (train_labels, test_labels) if _countable(labels)]
    # A label past the number of samples numbers no class; nor must it make a name for every number.
    classes = max(1, min(max(tops, default=0) + 1, train_labels.size))
    return Source(
        name=name,
        train_values=train,
        train_labels=train_labels,
        test_values=test,
        test_labels=test_labels,
        full_scale=255.0 if train.dtype == np.uint8 else 1.0,
        class_names=tuple(str(label) for label in range(classes)),
    )


def _npz_error(path: Path, got: str) -> DataError:
    return DataError(
        expected="an .npz file with train_inputs, train_labels, test_inputs and test_labels",
        got=got,
        where=str(path),
        todo="write it with np.savez(PATH, train_inputs=..., train_labels=..., ...)",
    )


def _as_values(inputs: np.ndarray) -> np.ndarray:
    """Return floats as float32, anything else as it is, in C order."""
    if np.issubdtype(inputs.dtype, np.floating):
        with np.errstate(over="ignore"):  # a value beyond float32 is reported as infinite, by index
            inputs = inputs.astype(np.float32)
    return np.asarray(inputs, order="C")


def _as_labels(labels: np.ndarray) -> np.ndarray:
    """Return integers as int64, anything else as it is."""
    return labels.astype(np.int64) if np.issubdtype(labels.dtype, np.integer) else labels


def _countable(labels: np.ndarray) -> bool:
    return labels.dtype == np.int64 and labels.size > 0


# ------------------------------------------------------------------------------ images


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageList:
    """The images of a folder, each at its permanent index.

    Attributes
    ----------
    root
        The folder, an absolute path.
    class_names
        The folders under train/, sorted.
    train_paths, test_paths
        [N], sorted by class and file name. The position is the sample's permanent index.
    train_labels, test_labels
        int64 [N].
    """

    root: Path
    class_names: tuple[str, ...]
    train_paths: tuple[str, ...]
    train_labels: np.ndarray
    test_paths: tuple[str, ...]
    test_labels: np.ndarray

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths, training images first."""
        return self.train_paths + self.test_paths


def list_images(path: str | os.PathLike[str]) -> ImageList:
    """Return the images under PATH/train/CLASS and PATH/test/CLASS, in their permanent order.

    Hidden files and files that are no images (by their suffix) are left out.

    Raises
    ------
    DataError
        If train/ or test/ is missing, they differ in their classes, or a class has no image.
    """
    root = Path(os.path.abspath(os.path.expanduser(path)))
    layout = f"images as {root}/{{train,test}}/CLASS/IMAGE"
    parts: dict[str, dict[str, list[str]]] = {}
    for part in ("train", "test"):
        folder = root / part
        if not folder.is_dir():
            todo = f"put the images of the {part} set into {folder}/CLASS/"
            raise DataError(layout, f"no folder {part}/", str(root), todo)
        parts[part] = {
            entry.name: _image_names(entry.path)
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
            if entry.is_dir() and not entry.name.startswith(".")
        }
        if not parts[part]:
            raise DataError(layout, "no class folder", str(folder), "make one folder per class")
        empty = [name for name, files in parts[part].items() if not files]
        if empty:
            raise DataError(
                expected=f"images ({', '.join(sorted(IMAGE_SUFFIXES))}) in every class folder",
                got=f"none in {len(empty)} of {len(parts[part])}: {', '.join(empty[:5])}",
                where=str(folder / empty[0]),
                todo="add images or remove the folder, in train/ and test/ alike",
            )
    for part, other in (("test", "train"), ("train", "test")):
        extra = [name for name in parts[part] if name not in parts[other]]
        if extra:
            raise DataError(
                expected="the same class folders in train/ and test/",
                got=f"in {part}/ alone: {', '.join(extra[:5])}",
                where=str(root / part / extra[0]),
                todo=f"add the class to {other}/ or remove it from {part}/",
            )
    class_names = tuple(parts["train"])
    paths, labels = {}, {}
    for part, classes in parts.items():
        paths[part] = tuple(
            os.path.join(root, part, name, file) for name in class_names for file in classes[name]
        )
        counts = [len(classes[name]) for name in class_names]
        labels[part] = np.repeat(np.arange(len(class_names), dtype=np.int64), counts)
    return ImageList(
        root=root,
        class_names=class_names,
        train_paths=paths["train"],
        train_labels=labels["train"],
        test_paths=paths["test"],
        test_labels=labels["test"],
    )


def _image_names(folder: str) -> list[str]:
    """Return the sorted names of the images in a folder."""
    return sorted(
        name
        for name in os.listdir(folder)
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
    )


def decode_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the pixels of an image, uint8 [H, W, C]; a grayscale image has C = 1, others C = 3.

    Raises
    ------
    DataError
        If the file is no image, is damaged, or cannot be shown as 8-bit grayscale or RGB without
        loss (transparency, 16 bits).
    """
    try:
        with Image.open(path) as image:
            mode = image.mode + (" with transparency" if "transparency" in image.info else "")
            if mode in ("L", "RGB"):
                pixels = np.asarray(image)
            elif mode in ("1", "P"):
                pixels = np.asarray(image.convert("L" if mode == "1" else "RGB"))  # lossless
            else:
                pixels = None
    except Exception as error:  # Pillow's readers raise a dozen types on damaged files
        if isinstance(error, FileNotFoundError):
            todo = "restore the file; on a cluster, every machine must see it under this path"
        else:
            todo = "repair the file, or remove it"
        raise DataError(
            expected="a readable image",
            got=f"{type(error).__name__}: {error}",
            where=str(path),
            todo=todo,
        ) from None
    if pixels is None:
        raise DataError(
            expected="8-bit grayscale or RGB",
            got=f"an image of Pillow's mode {mode}",
            where=str(path),
            todo="convert the folder's images to 8-bit RGB or grayscale first",
        )
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def decode_images(paths: Sequence[str], out: np.ndarray) -> None:
    """Decode images into `out`, uint8 [N, C, H, W], whose shape they must have.

    Raises
    ------
    DataError
        For the first image that is unreadable or differs in its size or number of channels.
    """
    channels, height, width = out.shape[1:]
    for path, target in zip(paths, out, strict=True):
        pixels = decode_image(path)
        if pixels.shape != (height, width, channels):
            raise DataError(
                expected="images of one size and mode: the folder's first has "
                f"{width}x{height} pixels of {channels} channels",
                got=f"{pixels.shape[1]}x{pixels.shape[0]} pixels of {pixels.shape[2]} channels",
                where=str(path),
                todo="resize or convert the folder's images to one size and mode first",
            )
        target[...] = pixels.transpose(2, 0, 1)


def image_blocks(images: ImageList) -> tuple[tuple[int, int, int], list[slice]]:
    """Return the shape [C, H, W] of the first image, and the slices of `images.paths` to work on.

    A block has at most 32 MiB of pixels and 1,000 images (CIFAR-10: a few tenths of a second).
    """
    height, width, channels = decode_image(images.train_paths[0]).shape
    total = len(images.train_paths) + len(images.test_paths)
    rows = min(1000, max(1, _BLOCK_BYTES // (height * width * channels)))
    blocks = [slice(start, min(start + rows, total)) for start in range(0, total, rows)]
    return (channels, height, width), blocks


def images_source(name: str, images: ImageList, values: np.ndarray) -> Source:
    """Return the source of a folder from its decoded images.

    Parameters
    ----------
    name
        As in `load_source`.
    images
        The N images.
    values
        uint8 [N, C, H, W], in the order of `images.paths`.
    """
    train = len(images.train_paths)
    return Source(
        name=name,
        train_values=values[:train],
        train_labels=images.train_labels,
        test_values=values[train:],
        test_labels=images.test_labels,
        full_scale=255.0,
        class_names=images.class_names,
    )


def _decode_with_threads(images: ImageList) -> np.ndarray:
    """Return the decoded images of a folder, uint8 [N, C, H, W], in the order of their paths."""
    shape, blocks = image_blocks(images)
    paths = images.paths
    values = np.empty((len(paths), *shape), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow decodes without the GIL
        for _ in pool.map(lambda block: decode_images(paths[block], values[block]), blocks):
            pass  # the results come in order, so the first bad image is the one reported
    return values


# ---------------------------------------------------------------------- what training sees


class Dataset(NamedTuple):
    """A data set exactly as training sees it.

    Attributes
    ----------
    train_inputs, test_inputs
        float32 [N, ...], scaled.
    train_labels, test_labels
        int64 [N].
    """

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray


def scale_inputs(source: Source, scaling: Scaling) -> Dataset:
    """Return the inputs in float32, scaled.

    Parameters
    ----------
    source
        The stored values.
    scaling
        "unit": values / full_scale, so that pixels lie in [0, 1]. "standard": then minus the mean
        and over the standard deviation (1 where it is 0) of the training set, for each channel of
        images [N, C, H, W], for each feature otherwise.

    Raises
    ------
    ConfigError
        If the scaling is neither.

    Notes
    -----
    The means are sums of float64 over blocks in a fixed order, so equal sources give equal bytes.
    Beyond the result there is never more than a few blocks of memory.
    """
    if scaling not in get_args(Scaling):
        raise ConfigError(
            expected=f"a scaling of {', '.join(get_args(Scaling))}",
            got=repr(scaling),
            where=f"data set {source.name}",
            todo='choose "unit" for pixels in [0, 1]',
        )
    scale = np.float32(source.full_scale)
    train = np.divide(source.train_values, scale, dtype=np.float32)
    test = np.divide(source.test_values, scale, dtype=np.float32)
    if scaling == "standard":
        mean, deviation = _moments(train)
        for inputs in (train, test):
            np.subtract(inputs, mean, out=inputs)
            np.divide(inputs, deviation, out=inputs)
    return Dataset(train, source.train_labels, test, source.test_labels)


def _moments(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (1 where it is 0) in float32, of shape [1, ...].

    float64 sums of up to 2^29 equal float32 values are exact, so that the deviation of a constant
    feature is 0 and not a rounding error to divide by.
    """
    axes = (0, 2, 3) if inputs.ndim == 4 else (0,)
    rows = max(1, _BLOCK_BYTES // (8 * inputs[0].size))
    blocks = [inputs[start : start + rows] for start in range(0, len(inputs), rows)]
    count = inputs.size // np.sum(inputs[:1], axis=axes).size
    mean = sum(block.sum(axis=axes, dtype=np.float64, keepdims=True) for block in blocks) / count
    squares = sum(np.square(block - mean).sum(axis=axes, keepdims=True) for block in blocks)
    deviation = np.sqrt(squares / count)
    return mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)


def load_dataset(
    name: str, *, data_dir: str | os.PathLike[str] | None = None, scaling: Scaling = "unit"
) -> Dataset:
    """Return a data set exactly as training sees it.

    Parameters
    ----------
    name, data_dir
        As in `load_source`.
    scaling
        As in `scale_inputs`; the paper does not state its own.

    Examples
    --------
    >>> digits = load_dataset("digits")
    >>> digits.train_inputs.shape, digits.test_labels.shape, float(digits.train_inputs.max())
    ((1500, 1, 8, 8), (297,), 1.0)
    """
    return scale_inputs(load_source(name, data_dir), scaling)
