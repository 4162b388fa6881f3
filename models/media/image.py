"""Images from files, by Pillow."""

import dataclasses
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError

from models.media.checks import check_file, check_pixels

Frame = UInt8[np.ndarray, "rows columns 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image:
    """One RGB image."""

    pixels: Frame

    def __post_init__(self):
        """Checks that there are pixels."""
        check_pixels(self.pixels, "an image")


def read_image(path: str | os.PathLike) -> Image:
    """The image in a file as RGB, turned upright as its EXIF orientation says; transparency is dropped."""
    check_file(path)
    try:
        with PillowImage.open(path) as image:
            return Image(pixels=np.array(ImageOps.exif_transpose(image).convert("RGB")))
    except UnidentifiedImageError as error:
        raise ValueError(f"an image must be in a format that Pillow reads, got path={str(path)!r}") from error
    except (OSError, SyntaxError, PillowImage.DecompressionBombError) as error:
        raise ValueError(f"an image file must decode whole, got path={str(path)!r}: {error}") from error
