"""Images of samples, many in one file: PNG where they are small and grey, else JPEG.

Larger images are reduced to 64 pixels on their longer side. Cells of a JPEG are padded to multiples
of 8 pixels, so that no block of it holds pixels of two samples.

Map: `SpriteSheet` (`of`, `encode`), `PAGE_SAMPLES`, `PER_ROW`.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

PER_ROW = 32
"""Cells in a row (arbitrary)."""
PAGE_SAMPLES = 1024
"""Cells in a file: 32 x 32 (arbitrary)."""
SMALL = 32
"""Longest side in pixels of images that are stored as they are."""
LONGEST = 64
"""Longest side in pixels that a larger image is reduced to (arbitrary)."""
QUALITY = 85
"""Of JPEG (arbitrary)."""
_BLOCK = 8


@dataclass(frozen=True)
class SpriteSheet:
    """The form of the images of a data set.

    Parameters
    ----------
    height, width
        Of an image, in pixels, after its reduction.
    grey
        Whether the images have one channel; of others the first three are shown.
    is_small
        Whether the images are as they are stored.
    """

    height: int
    width: int
    grey: bool
    is_small: bool

    @classmethod
    def of(cls, height: int, width: int, channels: int) -> "SpriteSheet":
        """Return the form of images of a size.

        Examples
        --------
        >>> SpriteSheet.of(28, 28, 1).ending, SpriteSheet.of(100, 200, 3).cell
        ('png', (32, 64))
        """
        longest = max(height, width)
        if longest <= SMALL:
            return cls(height, width, channels < 3, True)
        scale = LONGEST / max(longest, LONGEST)
        height, width = (max(1, round(side * scale)) for side in (height, width))
        return cls(height, width, channels < 3, False)

    @property
    def ending(self) -> str:
        """Ending of the file's name."""
        return "png" if self.grey and self.is_small else "jpg"

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width of a cell, in pixels."""
        if self.ending == "png":
            return self.height, self.width
        return -(-self.height // _BLOCK) * _BLOCK, -(-self.width // _BLOCK) * _BLOCK

    def encode(self, images: np.ndarray) -> bytes:
        """Return a file of images.

        Parameters
        ----------
        images : array [N, row, column, channel] of uint8
            At most `PAGE_SAMPLES`.
        """
        channels = 1 if self.grey else 3
        images = images[..., :channels]
        if images.shape[1:3] != (self.height, self.width):
            images = np.stack([self._reduce(image) for image in images])
        height, width = self.cell
        padding = ((0, 0), (0, height - self.height), (0, width - self.width), (0, 0))
        rows = -(-len(images) // PER_ROW)
        cells = np.zeros((rows * PER_ROW, height, width, channels), np.uint8)
        cells[: len(images)] = np.pad(images, padding, "edge")
        sheet = cells.reshape(rows, PER_ROW, height, width, channels).transpose(0, 2, 1, 3, 4)
        pixels = sheet.reshape(rows * height, PER_ROW * width, channels)
        picture = Image.fromarray(pixels[..., 0] if self.grey else pixels)
        content = io.BytesIO()
        if self.ending == "png":
            # Level 9 takes ten times as long, and saves 3 % of MNIST.
            picture.save(content, "png", compress_level=6)
        else:
            picture.save(content, "jpeg", quality=QUALITY, subsampling=0)
        return content.getvalue()

    def _reduce(self, image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image[..., 0] if self.grey else image)
        small = picture.resize((self.width, self.height), Image.Resampling.LANCZOS)
        return np.asarray(small).reshape(self.height, self.width, -1)
