"""What the stages of the Hopper kernel share: the work table's columns, what is known when traced, every array."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.attention.hopper.gpu_config import HopperConfig

HEAD, Q_START, FIRST, NUM_FULL, COUNT, POS_ROW = range(6)
"""Columns of the work table. COUNT is -1 in the row that ends it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelShape:
    """What the body knows when it is traced.

    Args:
      config: block sizes and buffers.
      num_programs: thread blocks.
      num_rows: q tiles in the work table.
      tiles_per_block: tiles of `config.tile_kv` in one visited block.
      num_entries: length of each head's block list.
      num_intervals: rows of each head's interval table.
      heads_per_kv_head: query heads that share one kv head.
      num_shared: kv rows of the shared view; later rows are the head's own.
      has_extra: whether a head has rows of its own.
      score_scale: factor on the scores, for base-2 exponentials.
      fixes_top: full tiles keep the maximum of the q tile's first tile; a row that this does not suit gets lse = +inf.
      interpretable: leave out what GPU interpret mode of JAX 0.11 cannot run: accumulators with an initial value.
    """

    config: HopperConfig
    num_programs: int
    num_rows: int
    tiles_per_block: int
    num_entries: int
    num_intervals: int
    heads_per_kv_head: int
    num_shared: int
    has_extra: bool
    score_scale: float
    fixes_top: bool
    interpretable: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Every array of the kernel by name: device memory, then shared memory, then barriers."""

    table: Any
    shares: Any
    start: Any
    interval: Any
    intervals: Any
    q: Any
    k: Any
    v: Any
    k_extra: Any
    v_extra: Any
    q_pos: Any
    kv_pos: Any
    out: Any
    lse: Any
    smem: dict[str, Any]
    barriers: dict[str, Any]


def tiles_of(shape: KernelShape, count):
    """Tiles of a q tile: an empty list runs one tile that masks everything, the end of the table none."""
    return jnp.where(count == 0, 1, jnp.maximum(count, 0) * shape.tiles_per_block)
