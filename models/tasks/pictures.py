"""What the frames of the tasks are painted with: handwritten digits, colours and photographs.

The digits are those of `sklearn.datasets.load_digits` (E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten
Digits, UCI, CC BY 4.0), the photographs those of `load_sample_images` (authors in models/assets/README.md).
"""

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any, cast

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

SIDE = 112
"""Pixels of a generated frame's side."""
BOX = 56
"""Pixels of the white square a digit is written in."""
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
NO_BOX = 255
"""Value of a digit's mask outside its white square; inside stands the ink, 0 to 16."""
NUM_TRAINING_DIGITS = 1437
"""Digit images that a model may be trained on; the 360 after them are held out (other writers come last)."""
PHOTO_ROWS = (160, 224, 336)
"""Pixels of the photographs' height at the scales they are shown in."""
PERMUTATIONS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
"""Orders of the colour channels that a photograph is shown in."""


@functools.lru_cache(maxsize=1)
def digit_labels() -> Int[np.ndarray, " n"]:
    """The digit that each handwritten image shows."""
    return np.asarray(_digits()["target"], np.int32)


@functools.lru_cache(maxsize=1)
def digit_masks() -> UInt8[np.ndarray, "n 112 112"]:
    """Every handwritten digit as ink (0 to 16) in a white square, each a little elsewhere; `NO_BOX` outside."""
    ink = np.asarray(_digits()["images"], np.uint8)
    magnified = ink.repeat(BOX // 8, axis=1).repeat(BOX // 8, axis=2)
    masks = np.full((len(ink), SIDE, SIDE), NO_BOX, np.uint8)
    corners = np.random.default_rng(0).integers(-7, 8, (len(ink), 2)) + (SIDE - BOX) // 2
    for mask, digit, (row, column) in zip(masks, magnified, corners, strict=True):
        mask[row : row + BOX, column : column + BOX] = digit
    return masks


@functools.lru_cache(maxsize=1)
def atlas() -> UInt8[np.ndarray, "sources rows columns 3"]:
    """Both photographs at the scales of `PHOTO_ROWS`, each in the upper left corner of its own page."""
    photographs = [_datasets().load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    shapes = photo_shapes()
    pages = np.zeros((len(shapes), *np.max(shapes, axis=0), 3), np.uint8)
    for number, (page, (rows, columns)) in enumerate(zip(pages, shapes, strict=True)):
        photograph = Image.fromarray(photographs[number // len(PHOTO_ROWS)])
        page[:rows, :columns] = np.asarray(photograph.resize((columns, rows), Image.Resampling.BICUBIC))
    return pages


def photo_shapes() -> np.ndarray:
    """Rows and columns of the photograph on each page of the atlas; the originals have 427 x 640 pixels."""
    return np.array([(rows, round(rows * 640 / 427)) for _ in range(2) for rows in PHOTO_ROWS])


def digit_images(digit: int, *, is_held_out: bool) -> Int[np.ndarray, " n"]:
    """The handwritten images of `digit`: those for training, or those held out."""
    found = np.flatnonzero(digit_labels() == digit)
    return found[(found >= NUM_TRAINING_DIGITS) == is_held_out]


def paint(base: Any, marks: Any, masks: Any, *, xp: ModuleType = np) -> Any:
    """Frames with what is marked on them: a card (colour and digit), or a digit on the frame itself.

    A card of colour c with its digit in a white square, and a frame with a digit:

        c c c c c        . . . . .
        c c 7 c c        . . 7 . .
        c c c c c        . . . . .

    Args:
        base: uint8 `[n, rows, columns, 3]`.
        marks: integers `[n, 2]`: number of the card's colour, and of the digit's image; -1 for none.
        masks: `digit_masks()`, of which `marks` chooses.
        xp: numpy or jax.numpy; both give the same pixels.
    """
    rows, columns = base.shape[1:3]
    row, column = np.arange(rows) * SIDE // rows, np.arange(columns) * SIDE // columns
    colours = xp.asarray(np.array(list(COLOURS.values()), np.uint8))
    colour = colours[xp.maximum(marks[:, 0], 0)][:, None, None]
    frames = xp.where((marks[:, 0] >= 0)[:, None, None, None], colour, base)
    ink = masks[xp.maximum(marks[:, 1], 0)][..., None]
    if (rows, columns) != (SIDE, SIDE):
        ink = ink[:, row][:, :, column]
    is_ink = (marks[:, 1] >= 0)[:, None, None, None] & (ink != NO_BOX)
    # 255 - 15 * 17 wraps to 0 for NO_BOX, which is_ink leaves out.
    return xp.where(is_ink, (255 - 15 * (ink & 31)).astype(np.uint8), frames)


def _digits() -> Mapping[str, Any]:
    return cast(Mapping[str, Any], _datasets().load_digits())


def _datasets():
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError("generated frames need scikit-learn's images: pip install scikit-learn") from error
    return datasets
