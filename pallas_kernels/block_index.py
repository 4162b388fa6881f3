"""BlockIndex: which kv blocks every q block visits."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.notation import AnyArray, Bool, Int32
from pallas_kernels.pytree import pytree, static_field

NO_LIMIT = 2**30
"""A distance interval's `hi` that excludes nothing."""


@pytree
class BlockIndex:
    """For each head and q block, the list of kv blocks it visits: full ones first, then partial ones.

    Row `(h, i)` owns the entries `first[h, i] : first[h, i] + count[h, i]` of its head's list. Lists are ragged, so
    one long row costs no other row anything, and rows may share entries (rows that visit everything all point to one
    ascending list). Two q blocks of 2 tokens, kv blocks of 2 tokens, causal over 4 tokens:

        first     0 0        row 0 visits [0]         mask   1 0 0 0
        num_full  0 1        row 1 visits [0, 2]             1 1 0 0
        count     1 2        (block 0 full, block            1 1 1 0
        start     0 2         2 masked)                      1 1 1 1

    Args:
      first: where the row's entries begin in `start`, in entries.
      num_full: leading entries of the row in which every query attends every key: no position is looked at.
      count: entries of the row, full and partial; 0 for a row that visits nothing.
      start: first kv row of each visited block, in tokens; the block lies inside the kv view and, if extra rows were
        gathered per head, on one side of the seam. A multiple of 16 for the TPU and Hopper kernels, whose copy engines
        move whole tiles of rows; not validated, as it is a traced value. Entries of no row are ignored.
      interval: row of `intervals` that each entry obeys; read for partial entries only.
      intervals: `lo, hi` pairs in tokens: a pair is attended iff `lo <= q_pos - kv_pos < hi` (and `kv_pos <= q_pos`).
      pos_row: which row of `kv_pos` the q block reads its key positions from.
      block_q, block_kv: tokens in a q block and in a kv block.
    """

    first: Int32[AnyArray, "h i"]
    num_full: Int32[AnyArray, "h i"]
    count: Int32[AnyArray, "h i"]
    start: Int32[AnyArray, "h l"]
    interval: Int32[AnyArray, "h l"]
    intervals: Int32[AnyArray, "h n 2"]
    pos_row: Int32[AnyArray, "h i"]
    block_q: int = static_field()
    block_kv: int = static_field()

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.first.shape[0]

    @property
    def num_q_blocks(self) -> int:
        """Q blocks of each head."""
        return self.first.shape[1]

    def visited_tiles(self):
        """Visited (q block, kv block) tiles of each head, float32 [h]: at 1M tokens a head may exceed int32."""
        return jnp.sum(self.count, axis=1, dtype=jnp.float32)


def index_from_block_mask(
    is_visited: Bool[np.ndarray, "h i j"], is_full: Bool[np.ndarray, "h i j"], *, block_q: int, block_kv: int
) -> BlockIndex:
    """The index that visits kv block `j * block_kv` wherever `is_visited`, built on the host for tests and benches."""
    num_heads, num_q_blocks, _ = is_visited.shape
    rows = [
        np.concatenate([np.flatnonzero(v & f), np.flatnonzero(v & ~f)]).astype(np.int32)
        for v, f in zip(is_visited.reshape(-1, is_visited.shape[2]), is_full.reshape(-1, is_full.shape[2]), strict=True)
    ]
    count = np.array([len(row) for row in rows], np.int32).reshape(num_heads, num_q_blocks)
    first = (np.cumsum(count, axis=1) - count).astype(np.int32)
    start = np.zeros((num_heads, max(1, count.sum(axis=1).max())), np.int32)
    for h in range(num_heads):
        blocks = np.concatenate(rows[h * num_q_blocks : (h + 1) * num_q_blocks])
        start[h, : len(blocks)] = blocks * block_kv
    return BlockIndex(
        first=first,
        num_full=(is_visited & is_full).sum(axis=2).astype(np.int32),
        count=count,
        start=start,
        interval=np.zeros_like(start),
        intervals=np.full((num_heads, 1, 2), (0, NO_LIMIT), np.int32),
        pos_row=np.zeros((num_heads, num_q_blocks), np.int32),
        block_q=block_q,
        block_kv=block_kv,
    )
