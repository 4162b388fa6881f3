"""Checks that files and pixels are there."""

import math
import os
from pathlib import Path

import numpy as np


def check_fps(fps: float) -> None:
    """Raises ValueError unless a rate is positive and finite."""
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive finite number of frames per second, got {fps=}")


def check_file(path: str | os.PathLike) -> None:
    """Raises ValueError unless a file is there and holds something."""
    if not Path(path).is_file():
        raise ValueError(f"no such file: path={str(path)!r}")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"a media file must not be empty, got 0 bytes in path={str(path)!r}")


def check_pixels(pixels: np.ndarray, kind: str) -> None:
    """Raises ValueError if an axis of the pixels is empty."""
    if 0 in pixels.shape:
        raise ValueError(f"{kind} needs at least one frame, row and column, got shape {pixels.shape}")
