"""Patches cut from pixels on the device: a quarter of the bytes to send, and no arithmetic on the host."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from models.huggingface.chat import Medium
from models.media.image import Image
from models.media.video import Video
from models.media.video_stream import VideoStream
from models.qwen2_5_vl.processing.placeholders import Grid
from models.qwen2_5_vl.processing.preprocess import Preprocess, frame_grid, normalised_levels, patchify, resize_all


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PixelSource:
    """The frames of an image or a video at the size the model sees.

    Args:
        frames: uint8 `[n, rows, columns, 3]` of the frames `[start, stop)`; may wait for them.
        num_frames: how many there are.
        grid: temporal patches, rows, columns, in patches.
        config: how they become patches.
    """

    frames: Callable[[int, int], np.ndarray]
    num_frames: int
    grid: Grid
    config: Preprocess

    def temporal_patches(self, start: int, stop: int) -> UInt8[np.ndarray, "m rows columns 3"]:
        """The frames of the temporal patches `[start, stop)`; a frame without a partner is repeated."""
        length = self.config.temporal_patch_size
        frames = self.frames(start * length, min(stop * length, self.num_frames))
        missing = (stop - start) * length - len(frames)
        return np.concatenate([frames, *[frames[-1:]] * missing]) if missing else frames


def num_and_shape(part: Medium) -> tuple[int, tuple[int, ...]]:
    """Frames of an image or a video, and the shape of each as it was decoded."""
    match part:
        case Image():
            return 1, part.pixels.shape
        case Video():
            return part.num_frames, part.frames.shape[1:]
        case VideoStream():
            return part.num_frames, part.frame_shape


def pixel_source(part: Medium, config: Preprocess) -> PixelSource:
    """The frames of an image or video, resized on demand to the size that the model sees."""
    num_frames, shape = num_and_shape(part)

    def frames(start: int, stop: int) -> np.ndarray:
        match part:
            case Image():
                return resize_all(part.pixels[None], config)
            case Video():
                return resize_all(part.frames[start:stop], config)
            case VideoStream():
                return resize_all(part.frames(start, stop), config)

    grid = frame_grid(num_frames, shape, config)
    return PixelSource(frames=frames, num_frames=num_frames, grid=grid, config=config)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PixelPatches:
    """The patches of a prompt's images and videos, in order, bit for bit those of `patchify`."""

    sources: tuple[PixelSource, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Patches, and numbers in each."""
        config = self.sources[0].config
        patch_dim = 3 * config.temporal_patch_size * config.patch_size**2
        return sum(math.prod(source.grid) for source in self.sources), patch_dim

    def rows(self, first: np.ndarray, width: int) -> Float[Array, "p c"]:
        """On the device, the `width` patches from each of `first` on: temporal patches of one size."""
        starts = np.cumsum([0, *(math.prod(source.grid) for source in self.sources)])
        numbers = np.searchsorted(starts, first, side="right") - 1
        places = (first - starts[numbers]) // width
        # Runs of one source, whose temporal patches follow one another: one run, except if a batch has several videos.
        breaks = np.flatnonzero((np.diff(numbers) != 0) | (np.diff(places) != 1)) + 1
        pieces = []
        for run, number in zip(np.split(places, breaks), numbers[[0, *breaks]], strict=True):
            pieces.append(self.sources[number].temporal_patches(int(run[0]), int(run[-1]) + 1))
        levels = np.stack([normalised_levels(self.sources[n].config) for n in numbers])
        config = self.sources[numbers[0]].config
        cut = (config.temporal_patch_size, config.merge_size, config.patch_size)
        return cut_patches(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), levels, cut)

    def __array__(self, dtype=None, copy=None) -> Float[np.ndarray, "p c"]:
        """All of them on the host."""
        pieces = [patchify(source.frames(0, source.num_frames), source.config)[0] for source in self.sources]
        # One video is not copied: its patches may be most of the host's memory.
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).astype(dtype or np.float32, copy=False)

    def digest_arrays(self) -> Iterator[np.ndarray]:
        """The pixels, an eighth of the patches' bytes, and how they are cut."""
        for source in self.sources:
            yield np.frombuffer(repr(source.config).encode(), np.uint8)
            yield source.frames(0, source.num_frames)


@functools.partial(jax.jit, static_argnums=2)
def cut_patches(
    frames: UInt8[Array | np.ndarray, "m rows columns 3"],
    levels: Float[Array | np.ndarray, "n 3 256"],
    cut: tuple[int, int, int],
) -> Float[Array, "p c"]:
    """The patches of `n` temporal patches of a size, float32, as `patchify` orders and normalises them.

    Args:
        frames: pixels.
        levels: what the 256 values of each channel become: looked up, so that they are the host's to the last bit.
        cut: frames in a patch, side of a token in patches, side of a patch in pixels.
    """
    length, merge, patch = cut
    _, rows, columns, _ = frames.shape
    n, unit = levels.shape[0], merge * patch
    pieces = frames.reshape(n, length, rows // unit, merge, patch, columns // unit, merge, patch, 3)
    pieces = pieces.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(n, -1, 3, length * patch**2)
    table = jnp.arange(n * 3).reshape(n, 1, 3, 1) * 256
    return jnp.take(levels.reshape(-1), table + pieces, mode="clip").reshape(-1, 3 * length * patch**2)
