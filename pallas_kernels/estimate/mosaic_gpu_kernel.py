"""The passes of the Hopper estimate: log-sum-exp of every query over a share of the keys, then mass by key or band.

Scores are cheap (64 queries a head) and HBM is not, so all passes compute them from k and nothing of size
[queries, keys] is written. One warpgroup a thread block; while it computes on one tile of keys the next one arrives.

    pass 1   scores = q k^T    rows are queries: a row's maximum and sum over the tile's keys
    pass 2   scores = k q^T    rows are keys: a row's sum over the queries, once their log-sum-exp is known
    pass 3   scores = q k^T    rows are queries: a row's sums over the few bands of diagonals that cross the tile
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

NUM_QUERIES = 64
"""Queries of a head: wgmma has M = 64."""

TILE_KEYS = 64
"""Keys of one step: rows of the second pass."""

MASKED = -1e38
"""A masked score: finite, and far below `LOWEST`, so that its weight is an exact 0."""

LOWEST = -1e30
"""The running maximum before the first key that a query sees; below every real score."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimateShape:
    """What the bodies know when they are traced.

    Args:
      num_heads: heads whose queries are given.
      tiles_per_program: tiles of `TILE_KEYS` keys that a thread block walks.
      num_tiles: tiles of all keys; the last thread blocks may have fewer.
      kv_heads_per_row: kv heads that share a row of `kv_pos`.
      score_scale: factor on the scores, for base-2 exponentials.
      band: keys in a band of diagonals, a divisor of `TILE_KEYS`; 0 in the passes that know none.
    """

    num_heads: int
    tiles_per_program: int
    num_tiles: int
    kv_heads_per_row: int
    score_scale: float
    band: int = 0

    @property
    def bands_per_tile(self) -> int:
        """Bands of one query that cross a tile: a tile rarely begins where a band does."""
        return TILE_KEYS // self.band + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Every array of a pass by name: device memory, then shared memory and barriers."""

    q: Any
    k: Any
    kv_head: Any
    q_pos: Any
    kv_pos: Any
    q_tile: Any
    k_tiles: Any
    q_ready: Any
    k_ready: Any


def lse_pass(refs: Refs, top_out: Any, total_out: Any, shape: EstimateShape):
    """Writes the maximum and the sum of each query over this thread block's keys; base 2."""
    layout = plgpu.Layout.WGMMA
    per_query = layout.reduce(1)
    head, share = _place(shape)
    q_pos = plgpu.load(refs.q_pos.at[head], layout=per_query, optimized=False)

    def tile(slot, kv_pos, carry):
        top, total = carry
        scores = _product(refs.q_tile, refs.k_tiles.at[slot], (NUM_QUERIES, TILE_KEYS)) * shape.score_scale
        scores = jnp.where(_along_rows(kv_pos, scores) <= _along_columns(q_pos, scores), scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        total = total * jnp.exp2(top - new_top) + jnp.sum(jnp.exp2(scores - _along_columns(new_top, scores)), axis=1)
        return new_top, total

    start = tuple(plgpu.layout_cast(jnp.full((NUM_QUERIES,), x, jnp.float32), per_query) for x in (LOWEST, 0.0))
    top, total = _walk(refs, shape, layout.reduce(0), tile, start)
    top_out[head, share], total_out[head, share] = top, total


def mass_pass(refs: Refs, lse: Any, mass: Any, shape: EstimateShape):
    """Writes the mass of each of this thread block's keys."""
    layout = plgpu.Layout.WGMMA
    head, share = _place(shape)
    q_pos = plgpu.load(refs.q_pos.at[head], layout=layout.reduce(0), optimized=False)
    lse = plgpu.load(lse.at[head], layout=layout.reduce(0), optimized=False)

    def tile(slot, kv_pos, number):
        scores = _product(refs.k_tiles.at[slot], refs.q_tile, (TILE_KEYS, NUM_QUERIES)) * shape.score_scale
        sees = _along_columns(kv_pos, scores) <= _along_rows(q_pos, scores)
        weights = jnp.where(sees, jnp.exp2(scores - _along_rows(lse, scores)), 0.0)
        mass[head, _rows(shape, share, number)] = jnp.sum(weights, axis=1)
        return number + 1

    _walk(refs, shape, layout.reduce(1), tile, jnp.int32(0))


def band_pass(refs: Refs, lse: Any, skew: Any, mass: Any, shape: EstimateShape):
    """Writes, for each of this thread block's tiles, the mass of each query in each of its bands, nearest last.

    Query `q` is `skew[q]` keys, less than a band, past the start of its band of distance 0. So its bands cut a tile
    that begins at a multiple of the band's width after keys `skew`, `skew + band`, ...: here for a band of 4 and tiles
    of 8, with the number of the band for each key.

        skew 0:   0 1 1 1 1 2 2 2        skew 2:   0 0 0 1 1 1 1 2
    """
    layout = plgpu.Layout.WGMMA
    per_query = layout.reduce(1)
    head, share = _place(shape)
    q_pos, lse, skew = (plgpu.load(x.at[head], layout=per_query, optimized=False) for x in (refs.q_pos, lse, skew))
    key = plgpu.broadcasted_iota(jnp.int32, (NUM_QUERIES, TILE_KEYS), 1, layout=layout)
    number = lax.shift_right_arithmetic(
        key - _along_columns(skew, key) + (shape.band - 1), jnp.int32(shape.band.bit_length() - 1)
    )

    def tile(slot, kv_pos, tile_number):
        scores = _product(refs.q_tile, refs.k_tiles.at[slot], (NUM_QUERIES, TILE_KEYS)) * shape.score_scale
        sees = _along_rows(kv_pos, scores) <= _along_columns(q_pos, scores)
        weights = jnp.where(sees, jnp.exp2(scores - _along_columns(lse, scores)), 0.0)
        for n in range(shape.bands_per_tile):
            in_band = jnp.sum(jnp.where(number == n, weights, 0.0), axis=1)
            mass[head, share * shape.tiles_per_program + tile_number, n] = in_band
        return tile_number + 1

    _walk(refs, shape, layout.reduce(0), tile, jnp.int32(0))


def _place(shape: EstimateShape):
    """Head and share of the keys of this thread block; heads side by side, so that they meet in the L2 cache."""
    program = lax.axis_index("program")
    return program % shape.num_heads, program // shape.num_heads


def _rows(shape: EstimateShape, share, number):
    start = (share * shape.tiles_per_program + number) * TILE_KEYS
    return pl.ds(pl.multiple_of(start, TILE_KEYS), TILE_KEYS)


def _walk(refs: Refs, shape: EstimateShape, pos_layout, tile, start):
    """Runs `tile(slot, kv_pos, carry)` over this thread block's tiles, the next one on its way meanwhile."""
    head, share = _place(shape)
    kv_head = refs.kv_head[head]
    num_tiles = jnp.minimum(shape.tiles_per_program, shape.num_tiles - share * shape.tiles_per_program)

    def load(number):
        source = refs.k.at[_rows(shape, share, number), kv_head]
        plgpu.copy_gmem_to_smem(source, refs.k_tiles.at[number % 2], refs.k_ready.at[number % 2])

    plgpu.copy_gmem_to_smem(refs.q.at[head], refs.q_tile, refs.q_ready)
    load(jnp.int32(0))
    plgpu.barrier_wait(refs.q_ready)

    def step(number, carry):
        pl.when(number + 1 < num_tiles)(lambda: load(number + 1))  # into the slot whose products are done
        rows = _rows(shape, share, number)
        kv_pos = plgpu.load(refs.kv_pos.at[kv_head // shape.kv_heads_per_row, rows], layout=pos_layout, optimized=False)
        plgpu.barrier_wait(refs.k_ready.at[number % 2])
        return tile(number % 2, kv_pos, carry)

    return lax.fori_loop(0, num_tiles, step, start)


def _product(rows, columns, size):
    """`rows columns^T` of two tiles in shared memory, float32."""

    def run(accumulator):
        plgpu.wgmma(accumulator, rows, columns.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(size, jnp.float32))


def _along_columns(x, like):
    return lax.broadcast_in_dim(x, like.shape, [0])


def _along_rows(x, like):
    return lax.broadcast_in_dim(x, like.shape, [1])
