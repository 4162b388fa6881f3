"""The passes of the Hopper estimate: log-sum-exp of every query over a split of the keys, then mass by key, or by
key and by band.

Scores are cheap (64 queries a head) and HBM is not, so all passes compute them from k and nothing of size
[queries, keys] is written. A thread block, one warpgroup, keeps a split of one kv head's keys in shared memory and
walks over the heads that read them; while it computes on one head's queries the next ones arrive.

    lse_pass    scores = q k^T    rows are queries: a row's maximum and sum over the split's keys
    mass_pass   scores = k q^T    rows are keys: a row's sum over the queries, once their log-sum-exp is known
    line_pass   scores = q k^T    instead: sums over the queries, and a row's over the few bands that cross a tile
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import WGMMA_ROWS, columns
from pallas_kernels.notation import INITIAL_ROW_MAX, MASKED_SCORE, Array, Ref, Scalar

NUM_QUERIES = WGMMA_ROWS
"""Queries of a head: the rows of one product."""

MIN_TILE = WGMMA_ROWS
"""Keys of one step are a multiple of these: they are the rows of the second pass's product."""

MAX_TILE = 128
"""Keys of one step, where a split has them: with fewer, tensor cores and exponentials wait for each other more often
(docs/log.md of 2026-11-26)."""

LAYOUT = plgpu.Layout.WGMMA
"""How the warpgroup's registers hold a tile of scores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimateShape:
    """What the bodies know when they are traced.

    Args:
      num_kv_heads: kv heads.
      num_keys: keys in a thread block's split.
      kv_heads_per_row: kv heads that share a row of `kv_pos`.
      score_scale: factor on the products, for base-2 exponentials; positive.
      band: keys in a band of diagonals, a divisor of `MIN_TILE`; 0 in the passes that know none.
    """

    num_kv_heads: int
    num_keys: int
    kv_heads_per_row: int
    score_scale: float
    band: int = 0

    @property
    def tile(self) -> int:
        """Keys of one step."""
        return min(self.num_keys, MAX_TILE)

    @property
    def num_tiles(self) -> int:
        """Steps of a split."""
        return self.num_keys // self.tile

    @property
    def bands_per_tile(self) -> int:
        """Bands of one query that cross a tile: a tile rarely begins where a band does."""
        return self.tile // self.band + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Every array of a pass by name: device memory, then shared memory and barriers.

    Args:
      heads: all heads, those of one kv head side by side; `first_head` says where each kv head's begin, and the end.
      min_q_pos: the smallest position among each head's queries.
      max_kv_pos: the largest position among each split's keys, for each row of `kv_pos`.
    """

    q: Ref
    k: Ref
    heads: Ref
    first_head: Ref
    q_pos: Ref
    kv_pos: Ref
    min_q_pos: Ref
    max_kv_pos: Ref
    q_tiles: Ref
    k_tiles: Ref
    q_ready: Ref
    k_ready: Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A split of the keys and one of the heads that read it, whose queries are in `q_tile`."""

    kv_head: Array
    split: Array
    head: Array
    q_tile: Ref
    sees_all: Array


def lse_pass(refs: Refs, max_out: Ref, sum_out: Ref, shape: EstimateShape) -> None:
    """Writes the maximum and the sum of each query over this thread block's keys; base 2."""

    def head(work: Work) -> None:
        def tile(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            row_max, row_sum = carry
            product = _products(refs, shape, work, n, key_axis=1)
            # The scale is positive: one product a row for the maximum, one multiply-add a score for the exponent.
            new_row_max = jnp.maximum(row_max, jnp.max(product, axis=1) * shape.score_scale)
            weights = jnp.exp2(product * shape.score_scale - columns(new_row_max, product.shape))
            return new_row_max, row_sum * jnp.exp2(row_max - new_row_max) + jnp.sum(weights, axis=1)

        def fill(x: float) -> Array:
            return plgpu.layout_cast(jnp.full((NUM_QUERIES,), x, jnp.float32), LAYOUT.reduce(1))

        row_max, row_sum = lax.fori_loop(0, shape.num_tiles, tile, (fill(INITIAL_ROW_MAX), fill(0.0)))
        max_out[work.head, work.split], sum_out[work.head, work.split] = row_max, row_sum

    _each_head(refs, shape, head)


def mass_pass(refs: Refs, lse: Ref, mass: Ref, shape: EstimateShape) -> None:
    """Writes the mass of each of this thread block's keys, for each head."""

    def head(work: Work) -> None:
        # Keys are the rows, M, so that a sum over the queries stays in the four threads that hold a row.
        head_lse = _along(1, lse.at[work.head], shape.tile)

        def tile(n: Array, _: None) -> None:
            weights = jnp.exp2(_products(refs, shape, work, n, key_axis=0) * shape.score_scale - head_lse)
            mass[work.head, _rows(shape, work, n)] = jnp.sum(weights, axis=1)

        lax.fori_loop(0, shape.num_tiles, tile, None)

    _each_head(refs, shape, head)


def line_pass(refs: Refs, lse: Ref, skew: Ref, mass: Ref, band_mass: Ref, shape: EstimateShape) -> None:
    """Writes what `mass_pass` does and, for each tile, the mass of each query in each of its bands, nearest last.

    Query `q` is `skew[q]` keys, less than a band, past the start of its band of distance 0. So its bands cut a tile
    that begins at a multiple of the band's width after keys `skew`, `skew + band`, ...: here for a band of 4 and tiles
    of 8, with the number of the band for each key.

        skew 0:   0 1 1 1 1 2 2 2        skew 2:   0 0 0 1 1 1 1 2

    Cut into pieces of one band's width, a band holds the keys past `skew` of one piece and the others of the next.
    """
    none = jnp.zeros((NUM_QUERIES, shape.band), jnp.float32)

    def head(work: Work) -> None:
        head_lse, head_skew = _along(0, lse.at[work.head], shape.tile), _along(0, skew.at[work.head], shape.band)
        # One comparison a head: the cuts of a band lie at the same place in all pieces (720 instructions a tile before,
        # 200 now, docs/log.md of 2026-11-26).
        is_past = plgpu.broadcasted_iota(jnp.int32, none.shape, 1, layout=LAYOUT) > head_skew

        def tile(n: Array, _: None) -> None:
            weights = jnp.exp2(_products(refs, shape, work, n, key_axis=1) * shape.score_scale - head_lse)
            # A sum over rows crosses warps, so it goes through shared memory (`SCRATCH_BYTES` of the launch).
            mass[work.head, _rows(shape, work, n)] = jnp.sum(weights, axis=0)
            cuts = range(0, shape.tile, shape.band)
            pieces = [none, *(lax.slice(weights, (0, x), (NUM_QUERIES, x + shape.band)) for x in cuts), none]
            for band in range(shape.bands_per_tile):
                in_band = jnp.sum(jnp.where(is_past, pieces[band], pieces[band + 1]), axis=1)
                band_mass[work.head, work.split * shape.num_tiles + n, band] = in_band

        lax.fori_loop(0, shape.num_tiles, tile, None)

    _each_head(refs, shape, head)


def _each_head(refs: Refs, shape: EstimateShape, body: Callable[[Work], None]) -> None:
    """Runs `body(work)` for every head that reads this thread block's keys, the next queries on their way meanwhile.

    Kv heads are side by side: together they read whole rows of k.
    """
    program = lax.axis_index("program")
    kv_head, split = program % shape.num_kv_heads, program // shape.num_kv_heads
    first, end = refs.first_head[kv_head], refs.first_head[kv_head + 1]

    def load(n: Array) -> None:
        plgpu.copy_gmem_to_smem(refs.q.at[refs.heads[n]], refs.q_tiles.at[n % 2], refs.q_ready.at[n % 2])

    def step(n: Array, _: None) -> None:
        # Into the buffer whose products are done: reading an accumulator waits for its wgmma.
        pl.when(n + 1 < end)(lambda: load(n + 1))
        head = refs.heads[n]
        sees_all = refs.max_kv_pos[kv_head // shape.kv_heads_per_row, split] <= refs.min_q_pos[head]
        plgpu.barrier_wait(refs.q_ready.at[n % 2])
        body(Work(kv_head=kv_head, split=split, head=head, q_tile=refs.q_tiles.at[n % 2], sees_all=sees_all))

    @pl.when(first < end)
    def _run():
        # One copy, of up to 512 rows at a head dim of 64: in tiles of 8 rows none of a box's sides is above 256.
        rows = pl.ds(pl.multiple_of(split * shape.num_keys, shape.num_keys), shape.num_keys)
        plgpu.copy_gmem_to_smem(refs.k.at[rows, kv_head], refs.k_tiles, refs.k_ready)
        load(first)
        plgpu.barrier_wait(refs.k_ready)
        lax.fori_loop(first, end, step, None)


def _products(refs: Refs, shape: EstimateShape, work: Work, n: Array, *, key_axis: int) -> Array:
    """Products of the head's queries and the n-th tile of keys, which lie along `key_axis`; not yet scaled."""
    k_tile = refs.k_tiles.at[pl.ds(pl.multiple_of(n * shape.tile, shape.tile), shape.tile)]

    def hide(product: Array) -> Array:
        q_pos = _along(1 - key_axis, refs.q_pos.at[work.head], shape.tile)
        row = work.kv_head // shape.kv_heads_per_row
        kv_pos = _along(key_axis, refs.kv_pos.at[row, _rows(shape, work, n)], NUM_QUERIES)
        return jnp.where(kv_pos <= q_pos, product, MASKED_SCORE)

    product = _product(work.q_tile, k_tile) if key_axis == 1 else _product(k_tile, work.q_tile)
    # A mask is 32 comparisons and 32 selects of each thread, and nearly all keys lie before all of the queries.
    return lax.cond(work.sees_all, lambda product: product, hide, product)


def _rows(shape: EstimateShape, work: Work, n: Scalar) -> pl.Slice:
    """The n-th tile's rows of k."""
    return pl.ds(pl.multiple_of(work.split * shape.num_keys + n * shape.tile, shape.tile), shape.tile)


def _product(left: Ref, right: Ref) -> Array:
    """`left right^T` of two tiles in shared memory, float32."""

    def run(accumulator: Ref) -> Array:
        plgpu.wgmma(accumulator, left, right.transpose((1, 0)))  # both lie along d, the axis summed over
        return accumulator[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((left.shape[0], right.shape[0]), jnp.float32))


def _along(axis: int, ref: Ref, width: int) -> Array:
    """A vector in device memory along one axis of a tile of scores, `width` numbers wide along the other."""
    # Mosaic GPU has no vectorised load of one value per row or column of an accumulator: `optimized=False` says so.
    x = plgpu.load(ref, layout=LAYOUT.reduce(1 - axis), optimized=False)
    return lax.broadcast_in_dim(x, (*x.shape, width) if axis == 0 else (width, *x.shape), [axis])
