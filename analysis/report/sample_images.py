"""Images of training samples, by their positions in a result.

Map: `read_images`.
"""

import numpy as np
import xarray as xr


def read_images(cube: xr.Dataset, positions: xr.DataArray | None) -> xr.DataArray | None:
    """Return the images of samples, such as the clusters' representatives.

    Parameters
    ----------
    cube
        One node of the cube.
    positions : DataArray (...)
        Positions in the training set; NaN or below 0 where there is no sample.

    Returns
    -------
    DataArray of uint8 (..., row, column, channel), or None
        White where there is no sample. None without `positions`, without a sample, or if the data
        set has no images.
    """
    if "image" not in cube or positions is None:
        return None
    chosen = positions.values
    valid = np.isfinite(chosen) & (chosen >= 0)
    samples = np.unique(chosen[valid]).astype(int)
    if not samples.size:
        return None
    image = cube["image"].transpose("sample", "row", "column", "channel")
    # Sorted, and each sample once: a lazy image array then reads each chunk once.
    read = (image.sel if "sample" in image.coords else image.isel)(sample=samples).values
    pictures = np.full((*chosen.shape, *read.shape[1:]), 255, np.uint8)
    pictures[valid] = read[np.searchsorted(samples, chosen[valid].astype(int))]
    return xr.DataArray(pictures, dims=(*positions.dims, "row", "column", "channel"))
