"""Load a data set by its name.

Map: `load_source` (stored values), `load_dataset` (scaled inputs for training).
"""

import os

from sampimp.data.digits import load_digits
from sampimp.data.images import load_folder
from sampimp.data.names import parse_name
from sampimp.data.npz import load_npz
from sampimp.data.official import load_cifar10, load_mnist
from sampimp.data.scaling import Dataset, Scaling, scale_inputs
from sampimp.data.source import Source


def load_source(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> Source:
    """Return a data set as stored, read from disk or downloaded.

    Official files are searched under `data_dir`, or else under the directory in the environment
    variable SAMPIMP_DATA, and downloaded into the user's cache if they are not there. Their MD5
    is checked in either case.

    Parameters
    ----------
    name
        "mnist" (the first 50,000 training images, 10,000 test images), "cifar10", "digits" (1,797
        images of 8x8 that come with scikit-learn, split into 1,500 and 297), `folder:PATH` with
        PATH/{train,test}/CLASS/IMAGE, or `npz:PATH` with the arrays train_inputs, train_labels,
        test_inputs and test_labels.
    data_dir
        Directory of the official files: DIR, DIR/mnist, DIR/MNIST/raw or DIR/cifar10, compressed or
        not.
    image_size
        Height and width to which the images of a `folder:PATH` are resized, and cropped at the
        centre; None if they have one size.

    Raises
    ------
    ConfigError
        The name is unknown.
    DataError
        Files are missing and cannot be downloaded, are damaged, or have values unfit for training.
    MissingPackageError
        The package that reads or downloads this kind of data set is not installed.
    """
    kind, path = parse_name(name)
    if kind == "mnist":
        return load_mnist(data_dir)
    if kind == "cifar10":
        return load_cifar10(data_dir)
    if kind == "digits":
        return load_digits()
    return load_npz(name, path) if kind == "npz" else load_folder(name, path, image_size)


def load_dataset(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    scaling: Scaling = "unit",
    image_size: int | None = None,
) -> Dataset:
    """Return the arrays that training reads: float32 inputs, scaled, and labels.

    Parameters
    ----------
    name, data_dir, image_size
        As in `load_source`.
    scaling
        As in `scale_inputs`; the paper does not state its scaling.

    Examples
    --------
    >>> digits = load_dataset("digits")
    >>> digits.train_inputs.shape, digits.test_labels.shape, float(digits.train_inputs.max())
    ((1500, 1, 8, 8), (297,), 1.0)
    """
    return scale_inputs(load_source(name, data_dir, image_size), scaling)
