"""Device memory of the vision tower while it encodes a prompt's images and videos."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.processing.placeholders import Grid
from models.qwen2_5_vl.vision.tower import BATCHES_IN_FLIGHT, FRAME_BATCH_PATCHES, MLP_MULTIPLE, batch_frames


def batch_patches(grids: Sequence[Grid]) -> Iterator[int]:
    """Patches of one batch, for each size of frames among the grids."""
    for rows, columns in dict.fromkeys(grid[1:] for grid in grids):
        num_frames = sum(grid[0] for grid in grids if grid[1:] == (rows, columns))
        yield rows * columns * batch_frames(num_frames, (rows, columns))


def encoding_bytes(config: VisionConfig, num_patches: int, dtype: DTypeLike) -> int:
    """Bytes of a batch while it is encoded: its activations, a layer's weights, and what is there of two batches.

    With fused attention; XLA's holds scores too, up to `vision_attention.SCORE_BYTES` at a time.
    """
    arrived = num_patches * config.patch_dim * jnp.dtype(jnp.float32).itemsize
    tokens = num_patches // config.block_len * config.out_dim * jnp.dtype(dtype).itemsize
    return activation_bytes(config, num_patches, dtype) + BATCHES_IN_FLIGHT * (arrived + tokens)


def full_batch_bytes(config: VisionConfig, num_tokens: int, dtype: DTypeLike) -> int:
    """Bytes while a prompt of nothing but `num_tokens` of frames is encoded, whatever their size."""
    return encoding_bytes(config, min(FRAME_BATCH_PATCHES, num_tokens * config.block_len), dtype)


def activation_bytes(config: VisionConfig, num_patches: int, dtype: DTypeLike) -> int:
    """Bytes of a layer at its peak, in the MLP: input, normed, gate, up, product, and its weights."""
    width, e = jnp.dtype(dtype).itemsize, config.embed_dim
    mlp_dim = config.mlp_dim if width == 4 else -(-config.mlp_dim // MLP_MULTIPLE) * MLP_MULTIPLE
    weights = 4 * e * e + 3 * e * mlp_dim
    return width * (num_patches * (2 * e + 3 * mlp_dim) + weights)
