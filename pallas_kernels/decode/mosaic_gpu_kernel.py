"""The body of the Hopper decode kernel (split-KV): one query token, its heads as rows of a tile, a split of the keys.

The query heads that read one kv head fill the first rows of a tile of 64, wgmma's M. Most rows are empty, and that
costs nothing: reading 32 KB of keys and values takes longer than both products over 64 rows. A thread block walks its
split of a kv head's tiles of 64 keys, some of them in flight, and leaves a normalised output and a log-sum-exp; the
splits are merged outside. Several thread blocks on a multiprocessor hide each other's waits.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import WGMMA_ROWS, columns
from pallas_kernels.notation import INITIAL_ROW_MAX, MASKED_SCORE, Array, Ref

TILE_ROWS = WGMMA_ROWS
"""Query rows of a tile, most of them empty."""

TILE_KEYS = 64
"""Keys of one step: 16 KB of keys and of values at a head dim of 128, whose copies hide behind each other."""

LAYER, NUM_NEW, FIRST_LENGTH = range(3)
"""Places in `counts`: the layer, the number of new tokens, then the prompts' lengths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """What the body knows when it is traced.

    Args:
      batch, num_kv_heads: prompts, and kv heads of each.
      num_splits: thread blocks that split the keys of one kv head of one prompt.
      num_stages: tiles of keys and values in shared memory.
      num_rows: rows of the tile that hold query heads, rounded up to 8, the rows of a swizzled piece.
      capacity, new_capacity: rows of each prompt in the cache, and among the new tokens.
      score_scale: factor on the scores, for base-2 exponentials.
      interpretable: whether this is the twin for GPU interpret mode.
    """

    batch: int
    num_kv_heads: int
    num_splits: int
    num_stages: int
    num_rows: int
    capacity: int
    new_capacity: int
    score_scale: float
    interpretable: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Every array by name: device memory, then shared memory and barriers. Keys are `[layers * b * rows, g, d]`."""

    counts: Ref
    q: Ref
    k: Ref
    v: Ref
    k_new: Ref
    v_new: Ref
    out: Ref
    lse: Ref
    q_tile: Ref
    k_tiles: Ref
    v_tiles: Ref
    q_ready: Ref
    ready: Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one thread block does, as scalars; tiles of the new tokens follow those of the prompt."""

    prompt: Array
    kv_head: Array
    split: Array
    length: Array
    num_prompt_tiles: Array
    first_tile: Array
    num_tiles: Array


def decode_kernel(refs: Refs, shape: DecodeShape) -> None:
    """Runs one thread block: see the module's first lines."""
    work = _work(refs, shape)
    plgpu.copy_gmem_to_smem(refs.q.at[work.prompt * shape.num_kv_heads + work.kv_head], refs.q_tile, refs.q_ready)
    # All stages but one are filled at the start; each step then fills the slot of the step before.
    for n in range(shape.num_stages - 1):
        pl.when(n < work.num_tiles)(lambda n=n: _load(refs, shape, work, jnp.int32(n)))
    plgpu.barrier_wait(refs.q_ready)

    def step(n: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        ahead = n + shape.num_stages - 1  # into the slot whose products are done: one was read, which waits for it
        pl.when(ahead < work.num_tiles)(lambda: _load(refs, shape, work, ahead))
        return _tile(refs, shape, work, n, *carry)

    layout = plgpu.Layout.WGMMA
    acc = plgpu.layout_cast(jnp.zeros((TILE_ROWS, refs.q.shape[-1]), jnp.float32), layout)
    row_max, row_sum = (
        plgpu.layout_cast(jnp.full((TILE_ROWS,), x, jnp.float32), layout.reduce(1)) for x in (INITIAL_ROW_MAX, 0.0)
    )
    _store(refs, shape, work, *lax.fori_loop(0, work.num_tiles, step, (acc, row_max, row_sum)))


def _work(refs: Refs, shape: DecodeShape) -> Work:
    """Heads of one split side by side: together they read whole rows of the cache."""
    program = lax.axis_index("program")
    kv_head, rest = program % shape.num_kv_heads, program // shape.num_kv_heads
    split, prompt = rest % shape.num_splits, rest // shape.num_splits
    length, num_new = refs.counts[FIRST_LENGTH + prompt], refs.counts[NUM_NEW]
    num_prompt_tiles = pl.cdiv(length, TILE_KEYS)
    num_tiles = num_prompt_tiles + pl.cdiv(num_new, TILE_KEYS)
    # Lengths are known on the device alone, so the splits are cut here: equal within a tile.
    first, end = (n * num_tiles // shape.num_splits for n in (split, split + 1))
    return Work(
        prompt=prompt,
        kv_head=kv_head,
        split=split,
        length=length,
        num_prompt_tiles=num_prompt_tiles,
        first_tile=first,
        num_tiles=end - first,
    )


def _load(refs: Refs, shape: DecodeShape, work: Work, n: Array) -> None:
    """Starts the copies of this thread block's n-th tile."""
    slot, tile = n % shape.num_stages, work.first_tile + n
    example = refs.counts[LAYER] * shape.batch + work.prompt

    def copy(k: Ref, v: Ref, row: Array) -> None:
        # Whole tiles: each prompt's capacity is a multiple of 64 rows, so no box runs into the next prompt.
        rows = pl.ds(pl.multiple_of(row, TILE_KEYS), TILE_KEYS)
        for source, tiles in ((k, refs.k_tiles), (v, refs.v_tiles)):
            plgpu.copy_gmem_to_smem(source.at[rows, work.kv_head], tiles.at[slot], refs.ready.at[slot])

    @pl.when(tile < work.num_prompt_tiles)
    def _prompt():
        copy(refs.k, refs.v, example * shape.capacity + tile * TILE_KEYS)

    @pl.when(tile >= work.num_prompt_tiles)
    def _new():
        copy(refs.k_new, refs.v_new, example * shape.new_capacity + (tile - work.num_prompt_tiles) * TILE_KEYS)


def _tile(
    refs: Refs, shape: DecodeShape, work: Work, n: Array, acc: Array, row_max: Array, row_sum: Array
) -> tuple[Array, Array, Array]:
    """One step of the online softmax: accumulator, maximum and sum with the n-th tile."""
    slot, tile = n % shape.num_stages, work.first_tile + n
    is_new = tile >= work.num_prompt_tiles
    end = jnp.where(is_new, refs.counts[NUM_NEW], work.length)
    num_keys = end - jnp.where(is_new, tile - work.num_prompt_tiles, tile) * TILE_KEYS
    plgpu.barrier_wait(refs.ready.at[slot])
    pl.when(num_keys < TILE_KEYS)(lambda: _zero_padding(refs.v_tiles.at[slot], num_keys))

    def scores(accumulator: Ref) -> Array:
        # Both sides lie along the head dim, which is summed over: K-major, wgmma's natural order.
        plgpu.wgmma(accumulator, refs.q_tile, refs.k_tiles.at[slot].transpose((1, 0)))
        return accumulator[...]

    s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((TILE_ROWS, TILE_KEYS), jnp.float32))
    key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
    # Finite, so that a tile without a key leaves no NaN; and `where`, so that scores of NaN keys go too.
    s = jnp.where(key < num_keys, s * shape.score_scale, MASKED_SCORE)
    new_row_max = jnp.maximum(row_max, jnp.max(s, axis=1))
    weights = jnp.exp2(s - columns(new_row_max, s.shape))
    rescale = jnp.exp2(row_max - new_row_max)
    row_sum = row_sum * rescale + jnp.sum(weights, axis=1)
    acc = _add_product(shape, acc * columns(rescale, acc.shape), weights.astype(refs.q.dtype), refs.v_tiles.at[slot])
    return acc, new_row_max, row_sum


def _zero_padding(v_tile: Ref, num_keys: Array) -> None:
    """Zeroes the values past the last key, which may hold NaN: a weight of 0 times NaN is NaN."""
    v = plgpu.load(v_tile, layout=plgpu.Layout.WGMMA, optimized=False)
    key = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=plgpu.Layout.WGMMA)
    v_tile[...] = jnp.where(key < num_keys, v, jnp.zeros_like(v))
    plgpu.commit_smem()  # wgmma reads through the asynchronous proxy: what threads wrote needs a fence (PTX ISA)


def _add_product(shape: DecodeShape, acc: Array, weights: Array, v_tile: Ref) -> Array:
    """`acc + weights v`; the twin for interpret mode, which takes no left side in registers, multiplies plainly."""
    if shape.interpretable:
        value = acc + jnp.dot(weights, v_tile[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # a generic read, which the tensor cores would not do
        return value

    def run(accumulator: Ref) -> Array:
        # Rescaled first, then added to: the accumulator of a wgmma starts from a value in registers.
        accumulator[...] = acc
        plgpu.wgmma(accumulator, weights, v_tile)  # the left side may come from registers, the right one may not
        return accumulator[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((TILE_ROWS, acc.shape[1]), jnp.float32))


def _store(refs: Refs, shape: DecodeShape, work: Work, acc: Array, row_max: Array, row_sum: Array) -> None:
    """Writes this split's output, normalised, through q's buffer, and its log-sum-exp, base 2."""
    has_keys = row_sum > 0
    factor = jnp.where(has_keys, 1.0 / jnp.where(has_keys, row_sum, 1.0), 0.0)
    head = work.prompt * shape.num_kv_heads + work.kv_head
    divisor = jnp.where(has_keys, row_sum, 1.0)
    # Finite where there is no key: the merge subtracts the largest, and -inf from -inf is NaN.
    refs.lse[head, work.split] = jnp.where(has_keys, row_max + jnp.log2(divisor), INITIAL_ROW_MAX)
    # TMA stores from shared memory alone, and the queries are not needed again.
    refs.q_tile[...] = (acc * columns(factor, acc.shape)).astype(refs.q_tile.dtype)
    plgpu.commit_smem()  # TMA sees what threads wrote only past a proxy fence (PTX ISA, "fence.proxy.async")
    plgpu.copy_smem_to_gmem(refs.q_tile.at[pl.ds(0, shape.num_rows)], refs.out.at[head, work.split])
    plgpu.wait_smem_to_gmem(0)
