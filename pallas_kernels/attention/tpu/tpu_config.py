"""TpuConfig: how the Mosaic TPU kernel cuts its work, and the VMEM and SMEM that costs."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

LANES = 128
"""Lanes of a vector register, of 8 sublanes each: arrays are cut along their last axis at multiples of it."""

START_TOKENS = 16
"""Block starts are multiples of this: a bfloat16 register tile has 16 rows; DMAs from other rows do not compile."""

RING_ENTRIES, RINGS = 2048, 2
"""List entries that SMEM, 1 MiB of scalars, holds of one q block, and q blocks whose lists are there at once: 16 KiB.
The lists of a long prompt do not fit."""

PIECE_ENTRIES = 512
"""List entries that one copy brings: a quarter of the ring, so that copies run ahead of their readers."""

PIECES = RING_ENTRIES // PIECE_ENTRIES
"""Copies of a list that a ring holds at once, a power of two: places in it are found by masks."""

MAX_INTERVALS = START_TOKENS
"""A list entry keeps its interval's number in the low bits of its start."""

ROW_FIELDS = 8
"""int32 fields of a q block's row: first, num_full, count, pos_row, last, and zeros."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
    """Tile sizes of the TPU kernel.

    Args:
      tile_kv: kv rows gathered in VMEM and computed as one dense tile; a multiple of the index's `block_kv`.
      compute_kv: kv rows of one softmax step inside a dense tile; divides `tile_kv`.
      masked_kv: the same inside a tile with masks.
      compute_q: queries of one softmax step.
      vmem_limit_bytes: VMEM that the compiler may use for this kernel, its temporaries included.
    """

    tile_kv: int = 1024
    compute_kv: int = 1024
    masked_kv: int = 256
    compute_q: int = 512
    vmem_limit_bytes: int = 14 * 2**20

    def __post_init__(self):
        """Raises ValueError for sizes the kernel has no code for."""
        for name in ("compute_kv", "masked_kv"):
            step = getattr(self, name)
            if step % LANES or self.tile_kv % step:
                raise ValueError(f"{name} must be a multiple of {LANES} and divide {self.tile_kv=}, got {step}")

    def scratch(self, *, block_q: int, block_kv: int, width: int, kv_width: int, dtype: DTypeLike) -> dict[str, Any]:
        """The kernel's scratch by name; `width` is of the output's accumulator, `kv_width` of a gathered row."""
        blocks = self.tile_kv // block_kv
        return {
            # Two tiles, one gathered while one is computed. Their last two axes are a register tile of bfloat16, 16
            # rows of 128 lanes, so that any 16 rows of the cache are whole tiles here.
            "kv_tiles": pltpu.VMEM((2, self.tile_kv // START_TOKENS, kv_width // LANES, START_TOKENS, LANES), dtype),
            # A block may begin at any 16th lane of its first row of positions, and then ends in a row more.
            "pos_rows": pltpu.VMEM((2, blocks, block_kv // LANES + 1, 1, LANES), jnp.int32),
            "acc": pltpu.VMEM((block_q, width), jnp.float32),
            # One value a query in all 128 lanes, and sums in 128 parts: nothing crosses lanes until the q block ends.
            "row_max": pltpu.VMEM((block_q, LANES), jnp.float32),
            "row_sum": pltpu.VMEM((block_q, LANES), jnp.float32),
            "q_pos_column": pltpu.VMEM((block_q, LANES), jnp.int32),
            "limits": pltpu.VMEM((blocks, block_kv // LANES + 1, 1, LANES), jnp.int32),
            "lists": pltpu.SMEM((RINGS * RING_ENTRIES,), jnp.int32),
            "slot": pltpu.SMEM((1,), jnp.int32),
            # A DMA semaphore counts bytes: one a buffer does for all copies of a tile.
            "kv_arrived": pltpu.SemaphoreType.DMA((2,)),
            "pos_arrived": pltpu.SemaphoreType.DMA((2,)),
            "list_arrived": pltpu.SemaphoreType.DMA((RINGS, PIECES)),
        }

    def vmem_bytes(
        self, *, block_q: int, block_kv: int, width: int, kv_width: int, q_width: int, dtype: DTypeLike
    ) -> int:
        """VMEM of scratch, double-buffered q, out, positions and lse, and the scores and weights of one step."""
        scratch = self.scratch(block_q=block_q, block_kv=block_kv, width=width, kv_width=kv_width, dtype=dtype)
        held = sum(_bytes(x.shape, x.dtype) for x in scratch.values() if x.memory_space == pltpu.VMEM)
        # Pallas holds two buffers of every array that has a block, one in use and one in flight.
        moved = _bytes((block_q, q_width), dtype) + _bytes((block_q, width), dtype) + 2 * _bytes((1, block_q), "int32")
        step = _bytes((block_q, self.compute_kv), jnp.float32) + _bytes((block_q, self.compute_kv), dtype)
        return held + 2 * moved + step

    def smem_bytes(self) -> int:
        """SMEM of the lists, the slot, and the double-buffered rows of the q block, the next one, and the intervals."""
        scratch = self.scratch(block_q=LANES, block_kv=LANES, width=LANES, kv_width=LANES, dtype=jnp.bfloat16)
        held = sum(4 * math.prod(x.shape) for x in scratch.values() if x.memory_space == pltpu.SMEM)
        return held + 4 * 2 * (2 * ROW_FIELDS + 2 * MAX_INTERVALS)


def _bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Bytes in VMEM: the last axis in whole lanes, the one before in whole sublanes."""
    *outer, rows, lanes = shape
    item = jnp.dtype(dtype).itemsize
    # A register tile has 8 rows of 32-bit numbers, 16 of 16-bit ones.
    sublanes = 8 * 4 // item if rows > 1 else 1
    return math.prod(outer) * (-(-rows // sublanes) * sublanes) * (-(-lanes // LANES) * LANES) * item
