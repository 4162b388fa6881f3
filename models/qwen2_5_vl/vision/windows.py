"""Attention windows of a frame: index tables of its patches, computed on the host for each frame size."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Int32

from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.rope import inverse_frequencies


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """The windows of one frame size, cut from the top left, ragged at the right and bottom edges.

    A frame of 2 x 3 merged blocks with windows of 2 x 2 blocks (numbers are blocks, `.` is a hole):

        0 1 | 2 .        order:  0 1 3 4 2 5        rows:  0 1 2 3 | 4 5 4 4        lengths: 4 | 2
        3 4 | 5 .

    Fields:
        order: the patches, window by window: "window order", in which the layers hold them.
        rows: for every place of every window, its row in window order; the holes of a window come last and repeat its
            first row.
        lengths: patches in each window.
    """

    order: Int32[np.ndarray, " q"]
    rows: Int32[np.ndarray, "w p"]
    lengths: Int32[np.ndarray, " w"]

    @property
    def is_ragged(self) -> bool:
        """Whether any window has holes."""
        return len(self.order) < self.rows.size

    @property
    def filled(self) -> Int32[np.ndarray, " q"]:
        """Index of each row of window order among the flattened places of all windows."""
        return np.flatnonzero(np.arange(self.rows.shape[1]) < self.lengths[:, None]).astype(np.int32)


@functools.lru_cache(maxsize=64)
def windows(num_rows: int, num_columns: int, config: VisionConfig) -> Windows:
    """The windows of a frame of `num_rows` x `num_columns` patches, whose patches come block by block."""
    merge_size, side = config.merge_size, config.window_len
    block_rows, block_columns = num_rows // merge_size, num_columns // merge_size
    window_rows, window_columns = -(-block_rows // side), -(-block_columns // side)
    blocks = np.full((window_rows * side, window_columns * side), -1, np.int32)
    blocks[:block_rows, :block_columns] = np.arange(block_rows * block_columns).reshape(block_rows, block_columns)
    blocks = blocks.reshape(window_rows, side, window_columns, side).swapaxes(1, 2).reshape(-1, side**2)
    lengths = config.block_len * (blocks >= 0).sum(axis=1, dtype=np.int32)
    patches = blocks[blocks >= 0][:, None] * config.block_len + np.arange(config.block_len, dtype=np.int32)
    place = np.arange(side**2 * config.block_len, dtype=np.int32)
    rows = (np.cumsum(lengths) - lengths)[:, None] + np.where(place < lengths[:, None], place, 0)
    return Windows(order=patches.reshape(-1), rows=rows.astype(np.int32), lengths=lengths)


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
