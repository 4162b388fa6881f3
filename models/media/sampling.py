"""Sampling of a video: the frames that a model looks at, chosen from the header alone."""

import dataclasses
import math
import os

import numpy as np
from jaxtyping import Int64

from models.media.checks import check_file, check_fps
from models.media.probing import probe, readable

MAX_FRAMES = 768
"""Maximum number of frames that Qwen2-VL and Qwen2.5-VL sample from one video (`FPS_MAX_FRAMES` of qwen-vl-utils)."""

MIN_FRAMES = 4
"""Minimum number of sampled frames, if the video has as many (`FPS_MIN_FRAMES` of qwen-vl-utils)."""

TEMPORAL_PATCH_LEN = 2
"""Frames of one vision token (`FRAME_FACTOR` of qwen-vl-utils); the number of sampled frames is a multiple of it."""


def sample_indices(
    num_frames: int, *, source_fps: float, fps: float, max_frames: int = MAX_FRAMES
) -> Int64[np.ndarray, " n"]:
    """The source frames that Qwen2-VL samples: evenly spaced, an even number of them.

    10 frames at 4 per second, sampled at 2 per second: 10 / 4 * 2 = 5, made even: 4 frames, 2.5 apart:

        frame    0 1 2 3 4 5 6 7 8 9
        sampled  x   x     x   x

    A video of a single frame is sampled once; the patches repeat it.

    References: class Qwen2VLVideoProcessor of transformers, method sample_frames. Whole-number division here, float32
    there: of 20,000 random cases up to 20,000 frames, 10 differ by rounding.
    """
    check_fps(fps)
    if num_frames < 1 or max_frames < TEMPORAL_PATCH_LEN:
        raise ValueError(
            f"sampling needs a frame and a limit of {TEMPORAL_PATCH_LEN} or more: {num_frames=}, {max_frames=}"
        )
    at_most = max(min(max_frames, num_frames) // TEMPORAL_PATCH_LEN * TEMPORAL_PATCH_LEN, 1)
    target = min(max(num_frames / source_fps * fps, MIN_FRAMES), at_most)
    num_sampled = max(math.floor(target / TEMPORAL_PATCH_LEN) * TEMPORAL_PATCH_LEN, 1)
    return np.arange(num_sampled, dtype=np.int64) * num_frames // num_sampled


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampling:
    """The frames sampled from a video file.

    Args:
        path: of the file.
        indices: their numbers, ascending.
        num_frames: in the file.
        source_fps: frames of the file per second.
    """

    path: str | os.PathLike
    indices: Int64[np.ndarray, " n"]
    num_frames: int
    source_fps: float

    @property
    def fps(self) -> float:
        """Sampled frames per second."""
        return len(self.indices) / self.num_frames * self.source_fps


def sample_file(path: str | os.PathLike, *, fps: float, max_frames: int = MAX_FRAMES) -> Sampling:
    """The sampling of a file by `read_video`, of which nothing is decoded.

    Raises:
        ValueError: as `read_video`, as far as a header tells.
    """
    check_fps(fps)
    check_file(path)
    with readable(path):
        num_frames, source_fps = probe(path)
    indices = sample_indices(num_frames, source_fps=source_fps, fps=fps, max_frames=max_frames)
    return Sampling(path=path, indices=indices, num_frames=num_frames, source_fps=source_fps)
