"""Data sets: from the files of a source to the arrays that a network is trained on.

A data set has two forms. A `Source` holds the stored values (bytes of pixels, for instance) and
their digest; a `Dataset` holds the inputs of training: float32, scaled. A sample's position in the
training set is its permanent index, the `sample` coordinate of every record.

Map: `loading` (a data set by its name), `names` (names and short keys), `source` (`Source` and its
checks), `official` (MNIST and CIFAR-10: files, checksums, download), `digits` (scikit-learn's),
`images` (folders of images), `npz` (a user's arrays), `scaling` (`Dataset`, from stored values to
inputs).
"""

from sampimp._renamed import moved
from sampimp.data.loading import load_dataset, load_source
from sampimp.data.names import dataset_key
from sampimp.data.scaling import Dataset, Scaling, scale_inputs
from sampimp.data.source import Source

__all__ = [
    "Dataset",
    "Scaling",
    "Source",
    "dataset_key",
    "load_dataset",
    "load_source",
    "scale_inputs",
]

__getattr__ = moved(__name__)
