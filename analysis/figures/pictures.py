"""Images of samples side by side in one picture, which a page shows in parts.

Map: `encode_pictures`.
"""

import io

import numpy as np

LARGEST_SIDE = 48
"""Images with longer sides are reduced to this many pixels (arbitrary)."""


def encode_pictures(images: np.ndarray) -> bytes:
    """Return images as one PNG, in the grid that they are in.

    Parameters
    ----------
    images : array of uint8 [down, across, row, column, channel]
        Of one channel (grey), or of three and more, of which the first three are red, green, blue.

    Examples
    --------
    >>> encode_pictures(np.zeros((2, 24, 8, 8, 1), np.uint8))[1:4]
    b'PNG'
    """
    from PIL import Image

    down, across, height, width, channels = images.shape
    images = images[..., :3] if channels >= 3 else np.repeat(images[..., :1], 3, axis=-1)
    grid = images.transpose(0, 2, 1, 3, 4).reshape(down * height, across * width, 3)
    picture = Image.fromarray(np.ascontiguousarray(grid))
    if (longest := max(height, width)) > LARGEST_SIDE:
        height, width = (max(1, side * LARGEST_SIDE // longest) for side in (height, width))
        picture = picture.resize((across * width, down * height), Image.Resampling.BOX)
    if channels < 3:
        picture = picture.convert("L")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
