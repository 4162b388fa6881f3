"""The body of the Hopper decode kernel: one query token, its heads as the rows of a tile, a share of the keys.

The query heads that read one kv head fill the first rows of a tile of 64, wgmma's M. Most rows are empty, and that
costs nothing: reading 32 KB of keys and values takes longer than both products over 64 rows. A thread block walks its
share of a kv head's tiles of 64 keys, some of them in flight, and leaves a normalised output and a log-sum-exp; the
shares are merged outside. Several thread blocks on a multiprocessor hide each other's waits.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.notation import INITIAL_ROW_MAX, MASKED_SCORE

TILE_ROWS = 64
"""Query rows of a tile: wgmma has M = 64."""

TILE_KEYS = 64
"""Keys of one step."""

LAYER, NUM_NEW, FIRST_LENGTH = range(3)
"""Places in `counts`: the layer, the number of new tokens, then the prompts' lengths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """What the body knows when it is traced.

    Args:
      batch, num_kv_heads: prompts, and kv heads of each.
      num_shares: thread blocks that share the keys of one kv head of one prompt.
      num_stages: tiles of keys and values in shared memory.
      num_rows: rows of the tile that hold query heads, rounded up to 8.
      capacity, new_capacity: rows of each prompt in the cache, and among the new tokens.
      score_scale: factor on the scores, for base-2 exponentials.
      interpretable: whether this is the twin for GPU interpret mode.
    """

    batch: int
    num_kv_heads: int
    num_shares: int
    num_stages: int
    num_rows: int
    capacity: int
    new_capacity: int
    score_scale: float
    interpretable: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Every array by name: device memory, then shared memory and barriers. Keys are `[layers * b * rows, g, d]`."""

    counts: Any
    q: Any
    k: Any
    v: Any
    k_new: Any
    v_new: Any
    out: Any
    lse: Any
    q_tile: Any
    k_tiles: Any
    v_tiles: Any
    q_ready: Any
    ready: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one thread block does, as scalars; tiles of the new tokens follow those of the prompt."""

    prompt: Any
    kv_head: Any
    share: Any
    length: Any
    num_prompt_tiles: Any
    first_tile: Any
    num_tiles: Any


def decode_kernel(refs: Refs, shape: DecodeShape):
    """Runs one thread block: see the module's first lines."""
    work = _work(refs, shape)
    plgpu.copy_gmem_to_smem(refs.q.at[work.prompt * shape.num_kv_heads + work.kv_head], refs.q_tile, refs.q_ready)
    for n in range(shape.num_stages - 1):
        pl.when(n < work.num_tiles)(lambda n=n: _load(refs, shape, work, jnp.int32(n)))
    plgpu.barrier_wait(refs.q_ready)

    def step(n, carry):
        ahead = n + shape.num_stages - 1  # into the slot whose products are done
        pl.when(ahead < work.num_tiles)(lambda: _load(refs, shape, work, ahead))
        return _tile(refs, shape, work, n, *carry)

    layout = plgpu.Layout.WGMMA
    acc = plgpu.layout_cast(jnp.zeros((TILE_ROWS, refs.q.shape[-1]), jnp.float32), layout)
    top, total = (
        plgpu.layout_cast(jnp.full((TILE_ROWS,), x, jnp.float32), layout.reduce(1)) for x in (INITIAL_ROW_MAX, 0.0)
    )
    _store(refs, shape, work, *lax.fori_loop(0, work.num_tiles, step, (acc, top, total)))


def _work(refs: Refs, shape: DecodeShape) -> Work:
    """Heads of one share side by side: together they read whole rows of the cache."""
    program = lax.axis_index("program")
    kv_head, rest = program % shape.num_kv_heads, program // shape.num_kv_heads
    share, prompt = rest % shape.num_shares, rest // shape.num_shares
    length, num_new = refs.counts[FIRST_LENGTH + prompt], refs.counts[NUM_NEW]
    num_prompt_tiles = pl.cdiv(length, TILE_KEYS)
    num_tiles = num_prompt_tiles + pl.cdiv(num_new, TILE_KEYS)
    first, end = (n * num_tiles // shape.num_shares for n in (share, share + 1))
    return Work(
        prompt=prompt, kv_head=kv_head, share=share, length=length, num_prompt_tiles=num_prompt_tiles,
        first_tile=first, num_tiles=end - first,
    )  # fmt: skip


def _load(refs: Refs, shape: DecodeShape, work: Work, n):
    """Starts the copies of this thread block's n-th tile."""
    slot, tile = n % shape.num_stages, work.first_tile + n
    example = refs.counts[LAYER] * shape.batch + work.prompt

    def copy(k, v, row):
        rows = pl.ds(pl.multiple_of(row, TILE_KEYS), TILE_KEYS)
        for source, tiles in ((k, refs.k_tiles), (v, refs.v_tiles)):
            plgpu.copy_gmem_to_smem(source.at[rows, work.kv_head], tiles.at[slot], refs.ready.at[slot])

    @pl.when(tile < work.num_prompt_tiles)
    def _prompt():
        copy(refs.k, refs.v, example * shape.capacity + tile * TILE_KEYS)

    @pl.when(tile >= work.num_prompt_tiles)
    def _new():
        copy(refs.k_new, refs.v_new, example * shape.new_capacity + (tile - work.num_prompt_tiles) * TILE_KEYS)


def _tile(refs: Refs, shape: DecodeShape, work: Work, n, acc, top, total):
    """One step of the online softmax: accumulator, maximum and sum with the n-th tile."""
    slot, tile = n % shape.num_stages, work.first_tile + n
    is_new = tile >= work.num_prompt_tiles
    end = jnp.where(is_new, refs.counts[NUM_NEW], work.length)
    num_keys = end - jnp.where(is_new, tile - work.num_prompt_tiles, tile) * TILE_KEYS
    plgpu.barrier_wait(refs.ready.at[slot])
    pl.when(num_keys < TILE_KEYS)(lambda: _silence(refs.v_tiles.at[slot], num_keys))

    def scores(accumulator):
        plgpu.wgmma(accumulator, refs.q_tile, refs.k_tiles.at[slot].transpose((1, 0)))
        return accumulator[...]

    s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((TILE_ROWS, TILE_KEYS), jnp.float32))
    key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
    s = jnp.where(key < num_keys, s * shape.score_scale, MASKED_SCORE)
    new_top = jnp.maximum(top, jnp.max(s, axis=1))
    weights = jnp.exp2(s - _columns(new_top, s.shape))
    decay = jnp.exp2(top - new_top)
    total = total * decay + jnp.sum(weights, axis=1)
    acc = _add_product(shape, acc * _columns(decay, acc.shape), weights.astype(refs.q.dtype), refs.v_tiles.at[slot])
    return acc, new_top, total


def _silence(v_tile, num_keys):
    """Zeroes the values past the last key, which may hold NaN: a weight of 0 does not silence a NaN."""
    v = plgpu.load(v_tile, layout=plgpu.Layout.WGMMA, optimized=False)
    key = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=plgpu.Layout.WGMMA)
    v_tile[...] = jnp.where(key < num_keys, v, jnp.zeros_like(v))
    plgpu.commit_smem()


def _add_product(shape: DecodeShape, acc, weights, v_tile):
    """`acc + weights v`; the twin for interpret mode, which takes no left side in registers, multiplies plainly."""
    if shape.interpretable:
        value = acc + jnp.dot(weights, v_tile[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # a generic read, which the tensor cores would not do
        return value

    def run(accumulator):
        accumulator[...] = acc
        plgpu.wgmma(accumulator, weights, v_tile)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(acc.shape, jnp.float32))


def _store(refs: Refs, shape: DecodeShape, work: Work, acc, top, total):
    """Writes this share's output, normalised, through q's buffer, and its log-sum-exp, base 2."""
    has_keys = total > 0
    factor = jnp.where(has_keys, 1.0 / jnp.where(has_keys, total, 1.0), 0.0)
    head = work.prompt * shape.num_kv_heads + work.kv_head
    refs.lse[head, work.share] = jnp.where(has_keys, top + jnp.log2(jnp.where(has_keys, total, 1.0)), INITIAL_ROW_MAX)
    refs.q_tile[...] = (acc * _columns(factor, acc.shape)).astype(refs.q_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.q_tile.at[pl.ds(0, shape.num_rows)], refs.out.at[head, work.share])
    plgpu.wait_smem_to_gmem(0)


def _columns(x, shape):
    """A value per row, repeated along the columns."""
    return lax.broadcast_in_dim(x, shape, [0])
