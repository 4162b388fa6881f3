"""Frames painted on the device: the same pixels as `GeneratedHaystack` and `paint`, as normalised patches."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from models.small.config import small_processor
from models.tasks.digits import SIDE, digit_labels, digit_masks, handwriting
from models.tasks.pictures import PERMUTATIONS, atlas, paint, photo_shapes
from models.tasks.script import DIGIT, NUM_BASE
from pallas_kernels.pytree import pytree


@pytree
class Bank:
    """Pictures on the device.

    Fields:
        pages: the atlas in every order of channels, as it is and mirrored; 2 x 6 times its pages.
        ink: of every handwritten digit and its distorted copies.
        corners: of the white squares they are written in, in pixels.
    """

    pages: UInt8[Array, "looks rows columns 3"]
    ink: UInt8[Array, "n 8 8"]
    corners: Int[Array, "n 2"]


def make_bank() -> Bank:
    """The bank of the generated haystack."""
    looks = np.stack([atlas()[..., list(channels)] for channels in PERMUTATIONS], axis=1)
    both = np.stack([looks, looks[..., ::-1, :]], axis=2)
    ink, corners = handwriting(np.arange(len(digit_labels())))
    return Bank(
        pages=jnp.asarray(both.reshape(-1, *both.shape[3:])), ink=jnp.asarray(ink), corners=jnp.asarray(corners)
    )


def draw(bank: Bank, frames: Int[Array, "n 7"]) -> UInt8[Array, "n 112 112 3"]:
    """The pixels of frames in numbers."""
    num_columns = bank.pages.shape[2]
    assert num_columns == photo_shapes()[:, 1].max()
    look = (frames[:, 0] * len(PERMUTATIONS) + frames[:, 3]) * 2 + frames[:, 4]
    column = jnp.where(frames[:, 4] == 1, num_columns - SIDE - frames[:, 2], frames[:, 2])

    def cut(look, row, column):
        return jax.lax.dynamic_slice(bank.pages, (look, row, column, 0), (1, SIDE, SIDE, 3))[0]

    number = jnp.maximum(frames[:, DIGIT], 0)
    masks = digit_masks(bank.ink[number], bank.corners[number], xp=jnp)
    return paint(jax.vmap(cut)(look, frames[:, 1], column), frames[:, NUM_BASE:], masks, xp=jnp)


def patches(bank: Bank, frames: Int[Array, "f 7"], dtype: DTypeLike) -> Float[Array, "n p c"]:
    """The patches of every pair of frames, as the small model's processor cuts them."""
    config = small_processor().video
    pixels = draw(bank, frames).astype(jnp.float32) / 255
    pixels = (pixels - np.array(config.mean, np.float32)[None, None, None]) / np.array(config.std, np.float32)[
        None, None, None
    ]
    side, merge, patch = SIDE // config.token_size, config.merge_size, config.patch_size
    cut = pixels.astype(dtype).reshape(-1, 2, side, merge, patch, side, merge, patch, 3)
    return cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(len(frames) // 2, (side * merge) ** 2, config_dim(config))


def config_dim(config) -> int:
    """Numbers in a patch."""
    return 3 * config.temporal_patch_size * config.patch_size**2
