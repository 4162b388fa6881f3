"""How the patches of a frame are grouped into attention windows: index tables, computed on the host per frame size."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Float, Int32

from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.rope import inverse_frequencies


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """The windows of one frame size, cut from the top left, ragged at the right and bottom edges.

    A frame of 2 x 3 merged blocks with windows of 2 x 2 blocks (numbers are blocks, `.` is a hole); the holes of a
    window come last:

        0 1 | 2 .        order:  0 1 3 4 | 2 5 . .
        3 4 | 5 .

    Fields:
        order: patch in every place of every window; a hole names patch 0 and is False in `is_real`.
        is_real: whether the place holds a patch.
        place: for each patch, its place among the flattened windows.
    """

    order: Int32[np.ndarray, "w p"]
    is_real: Bool[np.ndarray, "w p"]
    place: Int32[np.ndarray, " q"]

    @property
    def lengths(self) -> Int32[np.ndarray, " w"]:
        """Patches in each window."""
        return self.is_real.sum(axis=1, dtype=np.int32)


@functools.lru_cache(maxsize=64)
def windows(num_rows: int, num_columns: int, config: VisionConfig) -> Windows:
    """The windows of a frame of `num_rows` x `num_columns` patches, whose patches come block by block."""
    merge_size, side = config.merge_size, config.window_len
    block_rows, block_columns = num_rows // merge_size, num_columns // merge_size
    window_rows, window_columns = -(-block_rows // side), -(-block_columns // side)
    blocks = np.full((window_rows * side, window_columns * side), -1, np.int32)
    blocks[:block_rows, :block_columns] = np.arange(block_rows * block_columns).reshape(block_rows, block_columns)
    blocks = blocks.reshape(window_rows, side, window_columns, side).swapaxes(1, 2).reshape(-1, side**2)
    blocks = np.take_along_axis(blocks, np.argsort(blocks < 0, axis=1, stable=True), axis=1)  # holes last
    patches = blocks[..., None] * config.block_len + np.arange(config.block_len, dtype=np.int32)
    is_real = np.repeat(blocks >= 0, config.block_len, axis=1)
    order = np.where(is_real, patches.reshape(is_real.shape), 0).astype(np.int32)
    place = np.empty(num_rows * num_columns, np.int32)
    place[order[is_real]] = np.flatnonzero(is_real)
    return Windows(order=order, is_real=is_real, place=place)


@functools.lru_cache(maxsize=64)
def rotary(num_rows: int, num_columns: int, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine `[patch, d]`, float32: half of the frequencies read the patch's row, half its column."""
    merge_size = config.merge_size
    shape = (num_rows // merge_size, num_columns // merge_size, merge_size, merge_size)
    block_row, block_column, row, column = np.indices(shape).reshape(4, -1)
    rows_and_columns = np.stack([block_row * merge_size + row, block_column * merge_size + column], axis=1)
    inverse: Float[np.ndarray, " d"] = inverse_frequencies(config.rope_theta, config.head_dim // 4)
    angles = (rows_and_columns[..., None].astype(np.float32) * inverse).reshape(len(row), -1)
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles), np.sin(angles)
