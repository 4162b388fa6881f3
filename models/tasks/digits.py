"""Handwritten digits by number: 1,797 images as they are, and distorted copies of those that may be trained on.

The images are those of `sklearn.datasets.load_digits` (E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten
Digits, UCI, CC BY 4.0): 8 x 8 cells of ink, 0 to 16, each the count of black pixels in 4 x 4.
"""

import functools
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

SIDE = 112
"""Pixels of a generated frame's side."""
BOX = 56
"""Pixels of the white square a digit is written in."""
CELLS = 8
"""Cells of ink along the side of a digit."""
NO_BOX = 255
"""Value of a digit's mask outside its white square; inside stands the ink, 0 to 16."""
NUM_DIGITS = 1797
"""Images as they are; distorted copy v of training image i has the number NUM_DIGITS + v * NUM_TRAINING_DIGITS + i."""
NUM_TRAINING_DIGITS = 1437
"""Digit images that a model may be trained on; the 360 after them are held out (other writers come last)."""
NUM_COPIES = 64
"""Distorted copies of every training image."""
UNDISTORTED_FRACTION = 0.125
"""Fraction of images that `distorted` leaves as they are."""


@functools.lru_cache(maxsize=1)
def digit_labels() -> Int[np.ndarray, " n"]:
    """The digit that each image shows, distorted copies included."""
    labels = np.asarray(_load_digits()["target"], np.int32)
    return np.concatenate([labels, np.tile(labels[:NUM_TRAINING_DIGITS], NUM_COPIES)])


def digit_images(digit: int, *, is_held_out: bool) -> Int[np.ndarray, " n"]:
    """The undistorted images of `digit`: those for training, or those held out."""
    images = np.flatnonzero(digit_labels()[:NUM_DIGITS] == digit)
    return images[(images >= NUM_TRAINING_DIGITS) == is_held_out]


def distorted(images: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """For each training image the number of one of its copies, or, for some, its own."""
    copies = NUM_DIGITS + rng.integers(0, NUM_COPIES, len(images)) * NUM_TRAINING_DIGITS + images
    return np.where(rng.random(len(images)) < UNDISTORTED_FRACTION, images, copies)


def handwriting(
    numbers: Int[np.ndarray, " n"],
) -> tuple[UInt8[np.ndarray, "n 8 8"], Int[np.ndarray, "n 2"]]:
    """Ink, 0 to 16, of the images of these numbers, and the upper left corners, in pixels, of their white squares."""
    ink, corners = np.zeros((len(numbers), CELLS, CELLS), np.uint8), np.zeros((len(numbers), 2), np.int32)
    copy = (numbers - NUM_DIGITS) // NUM_TRAINING_DIGITS
    for number in np.unique(copy):
        chosen = copy == number
        all_ink, all_corners = _copy(int(number)) if number >= 0 else _originals()
        image = numbers[chosen] if number < 0 else (numbers[chosen] - NUM_DIGITS) % NUM_TRAINING_DIGITS
        ink[chosen], corners[chosen] = all_ink[image], all_corners[image]
    return ink, corners


def digit_masks(ink: Any, corners: Any, *, xp: ModuleType = np) -> Any:
    """Digits in their squares, uint8 `[n, SIDE, SIDE]`: ink, 0 to 16; `NO_BOX` outside. A cell is 7 x 7 pixels.

    Args:
        ink: uint8 `[n, 8, 8]`.
        corners: integers `[n, 2]`, row and column.
        xp: numpy or jax.numpy; both give the same pixels.
    """
    place = xp.arange(SIDE)[None, None] - corners[:, :, None]  # [n, 2, SIDE]
    is_inside = (place >= 0) & (place < BOX)
    cell = xp.clip(place // (BOX // CELLS), 0, CELLS - 1)
    rows = xp.take_along_axis(ink, cell[:, 0, :, None], axis=1)
    written = xp.take_along_axis(rows, cell[:, 1, None, :], axis=2)
    return xp.where(is_inside[:, 0, :, None] & is_inside[:, 1, None, :], written, np.uint8(NO_BOX))


@functools.lru_cache(maxsize=1)
def _originals() -> tuple[np.ndarray, np.ndarray]:
    """Ink and corners of the images as they are, each a little elsewhere."""
    ink = np.asarray(_load_digits()["images"], np.uint8)
    return ink, _corners(len(ink), np.random.default_rng(0))


@functools.lru_cache(maxsize=NUM_COPIES)
def _copy(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Ink and corners of distorted copy `number` of all training images."""
    rng = np.random.default_rng([number, 1])
    return distort(_originals()[0][:NUM_TRAINING_DIGITS], rng), _corners(NUM_TRAINING_DIGITS, rng)


def _corners(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-7, 8, (count, 2)) + (SIDE - BOX) // 2


def distort(ink: UInt8[np.ndarray, "n 8 8"], rng: np.random.Generator) -> UInt8[np.ndarray, "n 8 8"]:
    """The images turned, slanted, scaled, shifted, with thinner or thicker strokes; each with independent draws.

    Four points of every new cell look up the old ink, linear between the centres of cells. Ink above a level drawn
    between 5 and 8.5 of 16 becomes darker, below lighter: a low level thickens strokes. A cell is the mean of its
    points. Stronger distortions taught a perceptron no more of the writers held out, and made 3 % of copies unreadable:
    see docs/log.md.
    """
    count = len(ink)
    angle, slant = np.deg2rad(rng.uniform(-10, 10, (count, 1))), rng.uniform(-0.15, 0.15, (count, 1))
    scale, shift = rng.uniform(0.9, 1.1, (2, count, 1)), rng.uniform(-0.5, 0.5, (2, count, 1))
    level = rng.uniform(5, 8.5, (count, 1))
    points = (np.arange(2 * CELLS) + 0.5) / 2 - CELLS / 2
    row, column = (x.reshape(1, -1) - s for x, s in zip(np.meshgrid(points, points, indexing="ij"), shift, strict=True))
    old_row = (np.cos(angle) * row + np.sin(angle) * column) / scale[0]
    old_column = (np.cos(angle) * column - np.sin(angle) * row) / scale[1] + slant * row
    new_ink = _between_cells(ink, old_row + CELLS / 2 - 0.5, old_column + CELLS / 2 - 0.5)
    sharpened = np.clip(1.5 * (new_ink - level) + 8, 0, 16)
    return np.rint(sharpened.reshape(count, CELLS, 2, CELLS, 2).mean(axis=(2, 4))).astype(np.uint8)


def _between_cells(ink: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Ink at fractional cells `[n, points]`, bilinear; none outside."""
    padded = np.pad(ink, ((0, 0), (1, 2), (1, 2))).astype(np.float64)
    row, column = (np.clip(x, -1, CELLS) + 1 for x in (row, column))
    r, c = row.astype(int), column.astype(int)
    down, right, image = row - r, column - c, np.arange(len(ink))[:, None]
    above = padded[image, r, c] * (1 - right) + padded[image, r, c + 1] * right
    below = padded[image, r + 1, c] * (1 - right) + padded[image, r + 1, c + 1] * right
    return above * (1 - down) + below * down


@functools.lru_cache(maxsize=1)
def _load_digits() -> Any:
    return sklearn_datasets().load_digits()


def sklearn_datasets() -> ModuleType:
    """scikit-learn's images; `ValueError` where it is not installed."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError("generated frames need scikit-learn's images: pip install scikit-learn") from error
    return datasets
