"""The arrays of the Hopper kernel, what it knows when it is traced, and the columns of its work table."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.attention.hopper.gpu_config import HopperConfig
from pallas_kernels.notation import Array, Ref

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
      num_shared: kv rows of the shared view; later rows are gathered for the head.
      has_extra: whether rows are gathered for each head.
      score_scale: factor on the scores, for base-2 exponentials.
      fixed_max: full tiles keep the maximum of the q tile's first tile; a row that overflows so gets lse = +inf.
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
    fixed_max: bool
    interpretable: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Every array of the kernel by name: device memory, then shared memory, then barriers."""

    table: Ref
    assignment: Ref
    start: Ref
    interval: Ref
    intervals: Ref
    q: Ref
    k: Ref
    v: Ref
    k_extra: Ref
    v_extra: Ref
    q_pos: Ref
    kv_pos: Ref
    out: Ref
    lse: Ref
    smem: dict[str, Ref]
    barriers: dict[str, Ref]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One q tile of the work table, as scalars."""

    head: Array
    q_start: Array
    first: Array
    num_full: Array
    count: Array
    num_tiles: Array


def tiles_of(shape: KernelShape, count: Array) -> Array:
    """Tiles of a q tile: an empty list runs one tile that masks everything, the end of the table none."""
    # One masked tile writes the zeros and -inf of an empty list, by the steps of any other list.
    return jnp.where(count == 0, 1, jnp.maximum(count, 0) * shape.tiles_per_block)
