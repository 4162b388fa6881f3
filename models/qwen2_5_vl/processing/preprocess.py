"""Pixels to vision patches as Qwen2-VL and Qwen2.5-VL cut them: NumPy and Pillow, no model."""

import dataclasses
import math
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image as PillowImage

from models.media.image import Frame
from models.media.sampling import TEMPORAL_PATCH_LEN
from pallas_kernels.notation import Float

MAX_ASPECT_RATIO = 200
"""Of the longer side to the shorter one (`MAX_RATIO` of qwen-vl-utils, `smart_resize` of transformers)."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of each channel (`image_mean` and `image_std` of the published preprocessor_config.json, which are CLIP's)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Settings by which frames become patches; the defaults are those of transformers' Qwen2VLImageProcessor.

    Args:
        patch_size: side of a patch in pixels.
        merge_size: side of a token in patches.
        temporal_patch_size: frames in a patch.
        min_pixels, max_pixels: a frame is resized so that its pixels lie between these.
        mean, std: subtracted from, and divided into, every channel of pixels scaled to 0..1.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = TEMPORAL_PATCH_LEN
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self):
        """Checks that sizes and limits are possible."""
        if self.temporal_patch_size != TEMPORAL_PATCH_LEN:
            raise ValueError(f"temporal_patch_size must be {TEMPORAL_PATCH_LEN}, got {self.temporal_patch_size}")
        if self.patch_size < 1 or self.merge_size < 1:
            raise ValueError(f"patch_size and merge_size must be positive, got {self.patch_size=}, {self.merge_size=}")
        if not self.token_size**2 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"pixel limits must satisfy token_size**2 <= min_pixels <= max_pixels, got {self.token_size=}, "
                f"{self.min_pixels=}, {self.max_pixels=}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive in every channel, got {self.std=}")

    @property
    def token_size(self) -> int:
        """Side of a token in pixels."""
        return self.patch_size * self.merge_size


VIDEO = Preprocess(min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)
"""Frames of Qwen2.5-VL's videos (`VIDEO_MIN_PIXELS` and `VIDEO_MAX_PIXELS` of qwen-vl-utils)."""

MAX_VIDEO_TOKENS = int(128_000 * 0.9)
"""Tokens that `capped` divides among the frames of a video: 90 % of a context of 128,000 (`VIDEO_TOTAL_PIXELS` of
qwen-vl-utils)."""


def smart_resize(rows: int, columns: int, config: Preprocess) -> tuple[int, int]:
    """The rows and columns a frame is resized to: whole tokens, within the pixel limits, of nearly the same aspect.

    References: function smart_resize of transformers' Qwen2VLImageProcessor; `round` takes halves to even.
    """
    if min(rows, columns) < 1 or max(rows, columns) > MAX_ASPECT_RATIO * min(rows, columns):
        raise ValueError(f"the aspect ratio of a frame must be at most {MAX_ASPECT_RATIO}, got {rows=}, {columns=}")
    unit = config.token_size
    new_rows, new_columns = round(rows / unit) * unit, round(columns / unit) * unit
    if new_rows * new_columns > config.max_pixels:
        shrink = math.sqrt(rows * columns / config.max_pixels)
        return max(unit, _floor(rows / shrink, unit)), max(unit, _floor(columns / shrink, unit))
    if new_rows * new_columns < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (rows * columns))
        return math.ceil(rows * grow / unit) * unit, math.ceil(columns * grow / unit) * unit
    return new_rows, new_columns


def _floor(length: float, unit: int) -> int:
    return math.floor(length / unit) * unit


def capped(config: Preprocess, num_frames: int) -> Preprocess:
    """`config` with `max_pixels` lowered so that `num_frames` frames stay within MAX_VIDEO_TOKENS; warns if it is.

    Never below 1.05 times `min_pixels`, as qwen-vl-utils and transformers' `cap_pixels_per_frame` have it, so a long
    video may still have more tokens.
    """
    per_frame = MAX_VIDEO_TOKENS * config.token_size**2 * config.temporal_patch_size // num_frames
    max_pixels = max(min(config.max_pixels, per_frame), int(config.min_pixels * 1.05))
    if max_pixels < config.max_pixels:
        warnings.warn(
            f"{num_frames} frames have {MAX_VIDEO_TOKENS} tokens in all: pixels per frame capped at {max_pixels} "
            f"instead of {config.max_pixels}",
            stacklevel=2,
        )
        return dataclasses.replace(config, max_pixels=max_pixels)
    return config


def resize(frame: Frame, config: Preprocess) -> UInt8[np.ndarray, "new_rows new_columns 3"]:
    """The frame at its `smart_resize` size, bicubic; the frame itself if it has that size."""
    rows, columns = smart_resize(frame.shape[0], frame.shape[1], config)
    if frame.shape[:2] == (rows, columns):
        return frame
    return np.asarray(PillowImage.fromarray(frame).resize((columns, rows), PillowImage.Resampling.BICUBIC))


def resize_all(
    frames: UInt8[np.ndarray, "m rows columns 3"], config: Preprocess
) -> UInt8[np.ndarray, "m new_rows new_columns 3"]:
    """Every frame as `resize` makes it; the array itself if they have that size."""
    first = resize(frames[0], config)
    return frames if first.shape == frames.shape[1:] else np.stack([resize(frame, config) for frame in frames])


def frame_grid(num_frames: int, shape: tuple[int, ...], config: Preprocess) -> tuple[int, int, int]:
    """The grid (temporal, rows, columns) in patches of frames of a shape, after `resize`."""
    rows, columns = smart_resize(shape[0], shape[1], config)
    return -(-num_frames // config.temporal_patch_size), rows // config.patch_size, columns // config.patch_size


def patchify(frames: np.ndarray, config: Preprocess) -> tuple[Float[np.ndarray, "p c"], tuple[int, int, int]]:
    """Normalised patches of an image or a video, one row each, and its grid (temporal, rows, columns) in patches.

    Rows of the result run over time, then rows and columns of tokens, then the patches of a token, so the
    `merge_size**2` patches of a token are neighbours. A frame of 2 x 4 patches, merge_size 2, gives the rows

        0 1 4 5
        2 3 6 7

    A row holds the channels, in each the frames, in each the pixels. A frame without a partner is repeated: the last
    of an odd number, or an image.

    Args:
        frames: uint8 `[frames, rows, columns, 3]`, whole tokens (see `resize`).
    """
    num_frames, rows, columns, _ = frames.shape
    unit, merge, patch = config.token_size, config.merge_size, config.patch_size
    if frames.dtype != np.uint8 or rows % unit or columns % unit or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 and whole tokens of {unit} pixels, got {frames.dtype} {frames.shape}")
    grid = (-(-num_frames // config.temporal_patch_size), rows // patch, columns // patch)
    cut = (config.temporal_patch_size, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, 3)
    # One grid at a time into the result: an hour of video never exists twice.
    patches = np.empty((grid[0], grid[1] * grid[2], 3 * config.temporal_patch_size * patch**2), np.float32)
    levels = normalised_levels(config)
    for index, out in enumerate(patches):
        times = np.minimum(np.arange(config.temporal_patch_size) + index * config.temporal_patch_size, num_frames - 1)
        pixels = levels[np.arange(3), frames[times]]
        out[:] = pixels.reshape(cut).transpose(1, 4, 2, 5, 7, 0, 3, 6).reshape(out.shape)
    return patches.reshape(-1, patches.shape[-1]), grid


def normalised_levels(config: Preprocess) -> np.ndarray:
    """The 256 values of a pixel, normalised, for each channel: float32 [3, 256]."""
    mean, std = np.array(config.mean)[:, None], np.array(config.std)[:, None]
    return ((np.arange(256) / 255 - mean) / std).astype(np.float32)
