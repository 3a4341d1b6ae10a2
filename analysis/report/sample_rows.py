"""Values of training samples that are no images, from the data set in the study.

Map: `row_reader`.
"""

import numpy as np

from sampimp.analysis.report.sample_strip import ReadRow
from sampimp.store.datasets import open_source
from sampimp.store.location import Folder
from sampimp.store.plan_files import read_plan


def row_reader(out: str, node: str) -> ReadRow | None:
    """Return a function that reads a training sample by its position.

    Parameters
    ----------
    out
        The study's folder or `s3://` URL.
    node
        Path of the node in the cube.

    Returns
    -------
    function or None
        It returns the values before scaling. None if the study has no such data set.
    """
    folder = Folder.of(out)
    plan = read_plan(folder)
    keys = [key for key in plan.datasets if plan.node(key).strip("/") == node] if plan else []
    source = open_source(folder / "datasets" / f"{keys[0]}.zarr") if keys else None
    if source is None:
        return None

    def read(position: int) -> np.ndarray:
        return np.asarray(source.read("train_values", position, position + 1)[0])

    return read
