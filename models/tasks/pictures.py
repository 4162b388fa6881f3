"""Pictures of the tasks' frames: photographs, and on them colours and handwritten digits.

The photographs are those of `sklearn.datasets.load_sample_images` (authors in models/assets/README.md).
"""

import functools
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from models.tasks.digits import NO_BOX, SIDE, sklearn_datasets

COLOURS = {
    "red": (220, 30, 30),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 40),
    "green": (30, 160, 60),
    "cyan": (40, 205, 220),
    "blue": (30, 60, 215),
    "purple": (130, 40, 175),
    "pink": (245, 135, 185),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
    "brown": (120, 70, 30),
    "lime": (165, 250, 60),
    "teal": (0, 120, 125),
    "navy": (10, 10, 110),
    "beige": (235, 215, 170),
    "maroon": (115, 10, 40),
}
PHOTO_ROWS = (160, 224, 336)
"""Pixels of the photographs' height at the scales they are shown in."""
PERMUTATIONS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
"""Orders of the colour channels that a photograph is shown in."""


@functools.lru_cache(maxsize=1)
def atlas() -> UInt8[np.ndarray, "sources rows columns 3"]:
    """Both photographs at the scales of `PHOTO_ROWS`, each in the upper left corner of its own page."""
    photographs = [sklearn_datasets().load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    shapes = photo_shapes()
    pages = np.zeros((len(shapes), *np.max(shapes, axis=0), 3), np.uint8)
    for number, (page, (rows, columns)) in enumerate(zip(pages, shapes, strict=True)):
        photograph = Image.fromarray(photographs[number // len(PHOTO_ROWS)])
        page[:rows, :columns] = np.asarray(photograph.resize((columns, rows), Image.Resampling.BICUBIC))
    return pages


def photo_shapes() -> np.ndarray:
    """Rows and columns of the photograph on each page of the atlas; the originals have 427 x 640 pixels."""
    return np.array([(rows, round(rows * 640 / 427)) for _ in range(2) for rows in PHOTO_ROWS])


def paint(base: Any, marks: Any, masks: Any, *, xp: ModuleType = np) -> Any:
    """Frames with what is marked on them: a card (colour and digit), or a digit on the frame itself.

    A card of colour c with its digit in a white square, and a frame with a digit:

        c c c c c        . . . . .
        c c 7 c c        . . 7 . .
        c c c c c        . . . . .

    Args:
        base: uint8 `[n, rows, columns, 3]`.
        marks: integers `[n, 2]`: number of the card's colour, and of the digit's image; -1 for none.
        masks: `[n, SIDE, SIDE]`, `digit_masks` of each frame's digit; anything where there is none.
        xp: numpy or jax.numpy; both give the same pixels.
    """
    rows, columns = base.shape[1:3]
    row, column = np.arange(rows) * SIDE // rows, np.arange(columns) * SIDE // columns
    colours = xp.asarray(np.array(list(COLOURS.values()), np.uint8))
    colour = colours[xp.maximum(marks[:, 0], 0)][:, None, None]
    frames = xp.where((marks[:, 0] >= 0)[:, None, None, None], colour, base)
    ink = masks[..., None]
    if (rows, columns) != (SIDE, SIDE):
        ink = ink[:, row][:, :, column]
    is_ink = (marks[:, 1] >= 0)[:, None, None, None] & (ink != NO_BOX)
    # 255 - 15 * 17 wraps to 0 for NO_BOX, which is_ink leaves out.
    return xp.where(is_ink, (255 - 15 * (ink & 31)).astype(np.uint8), frames)
