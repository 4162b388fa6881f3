"""A video file of any length to time decoding on: a window that moves over a texture, H.264."""

import os

import av
import numpy as np
from PIL import Image

TEXTURE_SIDE, GRAIN = 1024, 96
"""Side of the texture in pixels, and how many random colours lie along it."""

STEP = (3, 5)
"""Rows and columns that the window moves between frames."""


def write_moving_video(path: str | os.PathLike, *, num_frames: int, side: int, fps: int, seed: int = 0) -> None:
    """Writes a square video of `num_frames` frames; no two neighbours are equal, and all are inter-coded as usual.

    Args:
        path: of an .mp4 file.
        side: of a frame in pixels, even, below `TEXTURE_SIDE`.
        fps: frames per second.
        seed: of the texture.
    """
    if side % 2 or not 0 < side < TEXTURE_SIDE:
        raise ValueError(f"side must be even and below {TEXTURE_SIDE}, got {side=}")
    grains = np.random.default_rng(seed).integers(0, 256, (GRAIN, GRAIN, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(grains).resize((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.BICUBIC))
    with av.open(os.fspath(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_type = side, side, "yuv420p", "AUTO"
        for frame in range(num_frames):
            row, column = (frame * step % (TEXTURE_SIDE - side) for step in STEP)
            window = np.ascontiguousarray(texture[row : row + side, column : column + side])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
        container.mux(stream.encode())
