"""Vision tokens written over the embeddings of their placeholders, a batch of frames at a time."""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from mmi_jax.layout import VISION
from models.prompt import LazyPatches, Prompt
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.processing.placeholders import Grid, num_tokens
from models.qwen2_5_vl.vision import tower as vision
from pallas_kernels.notation import AnyArray


class FrameBatch(NamedTuple):
    """Frames of one size that the vision tower encodes in one call.

    Fields:
        patches: of all its frames.
        grid: frames, rows, columns; as many frames as in other batches of the size, the last repeated.
        ranks: of each token among the prompt's vision tokens; their number for those of a repeated frame.
    """

    patches: Float[AnyArray, "p c"]
    grid: Grid
    ranks: Int[np.ndarray, " t"]


def frame_batches(patches: Float[AnyArray, "p c"] | LazyPatches, grids: tuple[Grid, ...], config: Qwen2_5_VLConfig):
    """All frames of all images and videos as `FrameBatch`es: a frame size has few shapes, however long the video.

    Raises:
        ValueError: patches do not fit the grids, or a grid does not consist of merged blocks.
    """
    lengths = [num_tokens(grid, config) for grid in grids]
    num_patches = [math.prod(grid) for grid in grids]
    if patches.shape != (expected := (sum(num_patches), config.vision.patch_dim)):
        raise ValueError(
            f"patches must have one row per patch of {grids=}: expected shape {expected}, got {patches.shape}"
        )
    return _batches(patches, grids, np.cumsum([0, *num_patches]), np.cumsum([0, *lengths]))


def _batches(patches, grids: tuple[Grid, ...], first_patches, first_ranks) -> Iterator[FrameBatch]:
    for size in dict.fromkeys(grid[1:] for grid in grids):
        members = [i for i, grid in enumerate(grids) if grid[1:] == size]
        frame_patches = math.prod(size)
        frame_tokens = (first_ranks[members[0] + 1] - first_ranks[members[0]]) // grids[members[0]][0]
        patch, rank = (
            np.concatenate([first[i] + width * np.arange(grids[i][0]) for i in members])
            for first, width in ((first_patches, frame_patches), (first_ranks, frame_tokens))
        )
        length = vision.batch_frames(len(patch), size)
        for begin in range(0, len(patch), length):
            frames, ranks = patch[begin : begin + length], rank[begin : begin + length]
            repeats = length - len(frames)
            yield FrameBatch(
                patches=_rows(patches, np.pad(frames, (0, repeats), mode="edge"), frame_patches),
                grid=(length, *size),
                ranks=np.pad(
                    (ranks[:, None] + np.arange(frame_tokens)).reshape(-1),
                    (0, repeats * frame_tokens),
                    constant_values=first_ranks[-1],
                ),
            )


def _rows(patches: AnyArray | LazyPatches, first: np.ndarray, width: int) -> AnyArray:
    """`width` rows from each of `first` on; not copied where they follow one another."""
    if isinstance(patches, LazyPatches):
        return patches.rows(first, width)
    if (np.diff(first) == width).all():
        return patches[first[0] : first[0] + width * len(first)]
    return patches[(first[:, None] + np.arange(width)).reshape(-1)]


def vision_places(prompt: Prompt, num_vision: int) -> Int[AnyArray, " n"]:
    """Row of each vision token in the batch's `b * t` rows; one past the last row for a token that is none.

    Raises:
        ValueError: the layout holds another number of vision tokens than the grids make.
    """
    is_vision = (prompt.layout.modality == VISION).reshape(-1)
    if isinstance(is_vision, Tracer):
        places = jnp.flatnonzero(is_vision, size=num_vision, fill_value=len(is_vision))
        return jnp.append(places, len(is_vision))
    places = np.flatnonzero(is_vision)
    if len(places) != num_vision:
        raise ValueError(
            f"the layout must hold one vision token per merged block of {prompt.grids=}: "
            f"expected {num_vision}, got {len(places)}"
        )
    return np.append(places, len(is_vision))


@functools.partial(jax.jit, donate_argnums=0)
def put_rows(x: Float[Array, "b t e"], rows: Float[Array, "n e"], places: Int[AnyArray, " n"]) -> Float[Array, "b t e"]:
    """`x`, which is donated, with rows written at places among its `b * t`; places past the end are dropped."""
    return x.reshape(-1, x.shape[-1]).at[places].set(rows, mode="drop").reshape(x.shape)
