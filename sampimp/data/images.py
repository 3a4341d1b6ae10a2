"""Folders of images: PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE.

A sample's permanent index is its position in the list sorted by class and file name, whichever
thread or machine decodes it. Listing, decoding and assembling are separate functions, so that a
cluster decodes the same list in parallel (`sampimp.sweeps.ingest`) with the same result.

Images of different sizes are resized to one if that is asked for: turned as their EXIF data say,
scaled so that the shorter side fits, cropped to the centre, and decoded to RGB. If all pixels of
all images are grey, one channel is kept.

Map: `ImageList`, `list_images` (find and sort the images); `decode_image`, `decode_images` (read
their pixels); `image_blocks` (split the list into units of work); `images_source` (the `Source` of
decoded images); `load_folder` (all these steps, in threads).
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sampimp.data.npz import machine_memory
from sampimp.data.source import Source
from sampimp.errors import DataError, require_package

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""Suffixes of the files in a class folder that are images, in upper or lower case."""

LARGEST_IMAGE = 2**26
"""Pixels of the largest image that is decoded, 8192 x 8192 (arbitrary): a file of a few bytes may
claim any number."""

LARGEST_IMAGE_SIZE = 8192
"""Largest height and width to which images are resized: those of `LARGEST_IMAGE`."""

_BLOCK_BYTES = 2**25
"""Pixels decoded as one unit of work: arbitrary (32 MiB), small compared with any data set."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageList:
    """The images of a folder, in the order of their permanent indices.

    Attributes
    ----------
    root
        Absolute path of the folder.
    class_names
        Names of the folders under train/, sorted.
    train_paths, test_paths
        [N], sorted by class and file name. A position is the sample's permanent index.
    train_labels, test_labels
        int64 [N].
    image_size
        Height and width to which all are resized; None if they have one size.
    skipped
        Paths of the files that are no images by their suffix, hidden ones aside.
    """

    root: Path
    class_names: tuple[str, ...]
    train_paths: tuple[str, ...]
    train_labels: np.ndarray
    test_paths: tuple[str, ...]
    test_labels: np.ndarray
    image_size: int | None = None
    skipped: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths, training images first."""
        return self.train_paths + self.test_paths

    def files(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Return paths below `root`, as `train/cat/0001.png`."""
        return tuple(Path(path).relative_to(self.root).as_posix() for path in paths)


def list_images(path: str | os.PathLike[str], image_size: int | None = None) -> ImageList:
    """Return the images under PATH/train/CLASS and PATH/test/CLASS, in their permanent order.

    Hidden files and files without a suffix of `IMAGE_SUFFIXES` are skipped. `image_size` is an
    attribute of the list.

    Raises
    ------
    DataError
        train/ or test/ is missing, their classes differ, a class has no image, an image is in no
        class, a class has a folder in it, or the size is out of range.
    """
    if image_size is not None and not 1 <= image_size <= LARGEST_IMAGE_SIZE:
        raise DataError(
            expected=f"a size of images from 1 to {LARGEST_IMAGE_SIZE:,} pixels",
            got=f"{image_size:,}",
            where="image_size (--image-size)",
            todo="choose a size near that of the images, such as 64",
        )
    root = Path(os.path.abspath(os.path.expanduser(path)))
    skipped: list[str] = []
    train, test = (_list_classes(root, part, skipped) for part in ("train", "test"))
    _require_same_classes(root, train, test)
    class_names = tuple(train)
    return ImageList(
        root=root,
        class_names=class_names,
        train_paths=_paths(root / "train", class_names, train),
        train_labels=_labels(class_names, train),
        test_paths=_paths(root / "test", class_names, test),
        test_labels=_labels(class_names, test),
        image_size=image_size,
        skipped=tuple(sorted(skipped)),
    )


def _list_classes(root: Path, part: str, skipped: list[str]) -> dict[str, list[str]]:
    """Return the class folders of train/ or test/, sorted, with their sorted image names.

    Other files are added to `skipped`.
    """
    folder, layout = root / part, f"images as {root}/{{train,test}}/CLASS/IMAGE"
    if not folder.is_dir():
        todo = f"put the images of the {part} set into {folder}/CLASS/"
        raise DataError(layout, f"no folder {part}/", str(root), todo)
    entries = sorted(_visible(folder), key=lambda entry: entry.name)
    classes = {
        _text(entry.name, folder): _image_names(entry.path, skipped)
        for entry in entries
        if _is(entry.is_dir)
    }
    for entry in entries:
        if _is(entry.is_dir):
            continue
        if classes and _is_image_name(entry.name):
            raise DataError(
                expected=layout,
                got="an image in no class folder",
                where=entry.path,
                todo="move it into the folder of its class, or remove it",
            )
        skipped.append(entry.path)
    if not classes:
        raise DataError(layout, "no class folder", str(folder), "make one folder per class")
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise DataError(
            expected=f"images ({', '.join(sorted(IMAGE_SUFFIXES))}) in every class folder",
            got=f"none in {len(empty)} of {len(classes)}: {', '.join(empty[:5])}",
            where=str(folder / empty[0]),
            todo="add images or remove the folder, in train/ and test/ alike",
        )
    return classes


def _require_same_classes(
    root: Path, train: dict[str, list[str]], test: dict[str, list[str]]
) -> None:
    """Raise DataError if a class folder is in only one of train/ and test/."""
    for part, classes, other, others in (
        ("test", test, "train", train),
        ("train", train, "test", test),
    ):
        extra = [name for name in classes if name not in others]
        if extra:
            raise DataError(
                expected="the same class folders in train/ and test/",
                got=f"in {part}/ alone: {', '.join(extra[:5])}",
                where=str(root / part / extra[0]),
                todo=f"add the class to {other}/ or remove it from {part}/",
            )


def _paths(
    folder: Path, class_names: tuple[str, ...], classes: dict[str, list[str]]
) -> tuple[str, ...]:
    """Return the paths of all images, class by class."""
    return tuple(os.path.join(folder, name, file) for name in class_names for file in classes[name])


def _labels(class_names: tuple[str, ...], classes: dict[str, list[str]]) -> np.ndarray:
    """Return the label of every image, in the order of `_paths`."""
    counts = [len(classes[name]) for name in class_names]
    return np.repeat(np.arange(len(class_names), dtype=np.int64), counts)


def _visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return what a folder has, hidden files and folders aside."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            expected="a folder that can be listed",
            got=str(error.strerror),
            where=str(folder),
            todo="change its permissions, or remove it",
        ) from None


def _is(kind: Callable[[], bool]) -> bool:
    """Return what `is_dir` or `is_file` of an entry says; of a link to itself it raises."""
    try:
        return kind()
    except OSError:
        return False


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _image_names(folder: str, skipped: list[str]) -> list[str]:
    """Return the sorted names of the images in a folder; add other files to `skipped`."""
    names = []
    for entry in _visible(folder):
        if _is(entry.is_dir):
            raise DataError(
                expected="image files in the folder of a class",
                got="a folder, whose images would be in no class",
                where=entry.path,
                todo="move its images into the folder of the class, or remove it",
            )
        if not _is_image_name(entry.name):
            skipped.append(entry.path)
        elif not _is(entry.is_file):  # to open a pipe would wait without end
            raise DataError(
                expected="an image file",
                got="a pipe, a socket, a device or a link to nothing or to itself",
                where=entry.path,
                todo="remove it or rename it",
            )
        else:
            names.append(_text(entry.name, folder))
    return sorted(names)


def _text(name: str, folder: str | os.PathLike[str]) -> str:
    """Return a file's name, or raise DataError if it is not UTF-8: JSON cannot hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            expected="names of classes and images in UTF-8",
            got=repr(os.fsencode(name)),
            where=f"{os.fspath(folder)}",
            todo="rename it, in train/ and test/ alike",
        ) from None
    return name


def decode_image(path: str | os.PathLike[str], image_size: int | None = None) -> np.ndarray:
    """Return the pixels of an image, uint8 [H, W, C]; a grayscale image has C = 1, others C = 3.

    With `image_size`, the image is resized and cropped to it, and has C = 3.

    Raises
    ------
    DataError
        The file is not an image, is damaged, or has no lossless 8-bit grayscale or RGB form
        (transparency, 16 bits).
    MissingPackageError
        Pillow is not installed.
    """
    require_package("PIL.Image", "study")
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if math.prod(image.size) > LARGEST_IMAGE:
                raise ValueError(f"{image.width}x{image.height} pixels in the file's header")
            mode = image.mode + (" with transparency" if "transparency" in image.info else "")
            if mode in ("L", "RGB", "1", "P") and image_size is not None:
                upright = ImageOps.exif_transpose(image).convert("RGB")
                pixels = np.asarray(ImageOps.fit(upright, (image_size, image_size)))
            elif mode in ("L", "RGB"):
                pixels = np.asarray(image)
            elif mode in ("1", "P"):
                pixels = np.asarray(image.convert("L" if mode == "1" else "RGB"))  # lossless
            else:
                pixels = None
    except Exception as error:  # Pillow raises a dozen types of exceptions for damaged files
        if isinstance(error, FileNotFoundError):
            todo = "restore the file; on a cluster, every machine must reach it under this path"
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


def decode_images(paths: Sequence[str], out: np.ndarray, image_size: int | None = None) -> None:
    """Decode images into `out`, uint8 [N, C, H, W]; each must be C x H x W.

    With `image_size`, each is resized to it first.

    Raises
    ------
    DataError
        An image is unreadable or differs in size or number of channels; the first one is named.
    """
    channels, height, width = out.shape[1:]
    for path, target in zip(paths, out, strict=True):
        pixels = decode_image(path, image_size)
        if pixels.shape != (height, width, channels):
            raise DataError(
                expected="images of one size and mode: the folder's first has "
                f"{width}x{height} pixels of {channels} channels",
                got=f"{pixels.shape[1]}x{pixels.shape[0]} pixels of {pixels.shape[2]} channels",
                where=str(path),
                todo="choose a size for all of them, such as --image-size 64 (in Python, "
                "image_size=64), or resize or convert them first",
            )
        target[...] = pixels.transpose(2, 0, 1)


def image_blocks(images: ImageList) -> tuple[tuple[int, int, int], list[slice]]:
    """Return the shape [C, H, W] of all images, and the slices of `images.paths` to decode.

    A block has at most 32 MiB of pixels and 1,000 images (CIFAR-10: a few tenths of a second).

    Raises
    ------
    DataError
        As of `decode_image`, or all images together are larger than this machine's memory.
    """
    height, width, channels = decode_image(images.train_paths[0], images.image_size).shape
    total = len(images.train_paths) + len(images.test_paths)
    size, memory = total * height * width * channels, machine_memory()
    if size > memory:
        raise DataError(
            expected=f"images that fit into this machine's memory of {memory / 1e9:.0f} GB",
            got=f"{total:,} of {width}x{height} pixels, {size / 1e9:,.0f} GB",
            where=str(images.root),
            todo="choose a smaller size for all of them, such as --image-size 64, or use a machine "
            "with more memory",
        )
    rows = min(1000, max(1, _BLOCK_BYTES // (height * width * channels)))
    blocks = [slice(start, min(start + rows, total)) for start in range(0, total, rows)]
    return (channels, height, width), blocks


def images_source(name: str, images: ImageList, values: np.ndarray) -> Source:
    """Return the source of a folder from its decoded images.

    Parameters
    ----------
    name
        As in `sampimp.data.load_source`.
    images
        The list of the N images.
    values
        uint8 [N, C, H, W], in the order of `images.paths`.
    """
    train = len(images.train_paths)
    if images.image_size is not None and all(
        np.array_equal(values[:, channel], values[:, 0]) for channel in (1, 2)
    ):
        values = np.ascontiguousarray(values[:, :1])
    return Source(
        name=name,
        train_values=values[:train],
        train_labels=images.train_labels,
        test_values=values[train:],
        test_labels=images.test_labels,
        full_scale=255.0,
        class_names=images.class_names,
        image_size=images.image_size,
        notes=_skipped_note(images),
        train_files=images.files(images.train_paths),
        test_files=images.files(images.test_paths),
    )


def _skipped_note(images: ImageList) -> tuple[str, ...]:
    """Return a sentence on the files that are no images, if there are any."""
    if not images.skipped:
        return ()
    count, first = len(images.skipped), images.files(images.skipped[:3])
    files = "1 file is no image" if count == 1 else f"{count:,} files are no images"
    names = ", ".join(first) + (", ..." if count > len(first) else "")
    return (f"{files} by the suffix, and left out: {names}.",)


def load_folder(name: str, path: str | os.PathLike[str], image_size: int | None = None) -> Source:
    """Return the source of a folder of images, decoded by threads.

    Parameters
    ----------
    name
        As in `sampimp.data.load_source`.
    path
        The folder.
    image_size
        As for `list_images`.

    Raises
    ------
    DataError
        As in `list_images` and `decode_images`.
    MissingPackageError
        Pillow is not installed.
    """
    images = list_images(path, image_size)
    shape, blocks = image_blocks(images)
    paths = images.paths
    values = np.empty((len(paths), *shape), dtype=np.uint8)

    def decode(block: slice) -> None:
        decode_images(paths[block], values[block], image_size)

    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
        for _ in pool.map(decode, blocks):
            pass  # results come in order, so the error raised is that of the first bad image
    return images_source(name, images, values)
