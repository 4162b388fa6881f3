"""The body of the TPU kernel: scattered kv blocks gathered by DMA into one large VMEM tile, computed as a dense one.

One grid step is one q block of one head. Its list is cut into tiles of `config.tile_kv` rows; while one tile is
computed the DMAs of the next one run, and behind a q block's last tile those of the next q block's first, whose list
was brought to SMEM meanwhile:

    DMA      tile 1      tile 2      next q block's tile 0
    compute  tile 0      tile 1      tile 2                 store

Tiles of full blocks alone are computed without a mask. Others mix full, partial and missing blocks; each of their
blocks obeys `0 <= q_pos - kv_pos - low < width`, one comparison of offset integers (see `_write_limits`).

The softmax keeps no running maximum. Weights are `exp2(score - reference)` with one reference per query, the highest
score of a sample of the first tile's keys: a float's exponent has room for scores that rise 2^7 above it, so nothing is
ever rescaled, and the vector units have half the work. A q block whose sums leave that room, or fall so low that
weights were flushed to zero, is computed once more by an online softmax (Dao et al. 2022, "FlashAttention",
Algorithm 1). Sums stay spread over 128 lanes until the end.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.attention.tpu import mosaic_tpu_loads as loads
from pallas_kernels.attention.tpu.mosaic_tpu_loads import KernelShape, Refs, Row
from pallas_kernels.attention.tpu.tpu_config import LANES, MAX_INTERVALS, START_TOKENS
from pallas_kernels.notation import INITIAL_ROW_MAX, MASKED_SCORE, Array, Scalar

SAFE_SUM_RANGE = 2.0**-80, 2.0**96
"""Sums of weights that lost nothing: a million weights flushed below 2^-126 would not show in them, and values up to
2^31 do not overflow; whether any did is checked."""

INT_MIN, INT_MAX = np.iinfo(np.int32).min, np.iinfo(np.int32).max
"""As bounds (see `_write_limits`): below INT_MIN is nothing, of a missing block; below INT_MAX all, of a full one.
Adding INT_MIN is adding 2^31, modulo 2^32."""


def attention_kernel(refs: Refs, shape: KernelShape) -> None:
    """Attention of one q block of one head, and the first loads of the next q block."""
    i = pl.program_id(1)
    row, following = loads.read_row(refs.row, shape, i), loads.read_row(refs.next_row, shape, i + 1)
    following = dataclasses.replace(following, count=jnp.where(i + 1 < shape.num_q_blocks, following.count, 0))

    @pl.when(i == 0)
    def _first_of_a_head():
        # Scratch in SMEM outlives the grid step: it says into which buffer the step before loaded.
        refs.slot[0] = 0
        loads.start_piece(refs, shape, row, 0)

        @pl.when(row.count > 0)
        def _start():
            loads.start_tile(refs, shape, row, 0, 0)

    loads.start_piece(refs, shape, following, 0)
    # A row of positions becomes a column that is repeated over 128 lanes, so that comparisons need no relayout.
    refs.q_pos_column[...] = jnp.broadcast_to(refs.q_pos[0], (LANES, refs.q.shape[1])).T
    _reset(refs)
    num_tiles = pl.cdiv(row.count, shape.blocks)

    @pl.when((num_tiles == 0) & (following.count > 0))
    def _nothing_to_compute():
        loads.start_tile(refs, shape, following, 0, refs.slot[0])

    def tile(n: Array, slot: Array) -> Array:
        # Into the buffer of the tile before, whose products are in the accumulator.
        loads.start_next(refs, shape, row, following, n, num_tiles, 1 - slot)
        is_dense = row.is_dense(shape, n)

        @pl.when(is_dense)
        def _dense():
            loads.wait_dense(refs, slot)
            _compute(refs, shape, slot, is_dense=True)

        @pl.when(jnp.logical_not(is_dense))
        def _with_mask():
            loads.wait_tile(refs, shape, row, n, slot)

            @pl.when(n == 0)
            def _first():  # together, so that the scalar unit works while the vector unit does
                _choose_reference(refs, shape, slot)
                _write_limits(refs, shape, row, n, slot)

            @pl.when(n > 0)
            def _later():
                _write_limits(refs, shape, row, n, slot)

            _compute(refs, shape, slot, is_dense=False)

        return 1 - slot

    slot = lax.fori_loop(0, num_tiles, tile, refs.slot[0])
    refs.slot[0] = slot
    is_safe = _store(refs, shape)

    @pl.when((num_tiles > 0) & jnp.logical_not(is_safe))
    def _once_more():
        _attend_online(refs, shape, row, num_tiles, 1 - slot)
        _store(refs, shape)


def _reset(refs: Refs) -> None:
    """Empties the sums of the q block."""
    refs.acc[...] = jnp.zeros_like(refs.acc)
    refs.row_sum[...] = jnp.zeros_like(refs.row_sum)


def _choose_reference(refs: Refs, shape: KernelShape, slot: Scalar) -> None:
    """Sets the exponent that weights are taken relative to: the highest score of keys of the first two blocks.

    Masked ones count as well, unless they are NaN: any number will do that is near a query's true maximum.
    """
    # The last 128 keys of the block taken first, usually the diagonal's, and the first 128 of the next one, usually the
    # start of the prompt.
    begin = min(shape.block_kv, shape.config.tile_kv - LANES) - LANES
    keys, _ = _keys_and_values(refs, shape, slot, begin, 2 * LANES)
    scores = _scores(refs.q[0], keys)
    columns = [jnp.where(x > INITIAL_ROW_MAX, x, INITIAL_ROW_MAX) for x in _columns(scores)]
    highest = jnp.max(jnp.maximum(*columns), axis=1, keepdims=True)
    refs.row_max[...] = jnp.broadcast_to(highest * shape.score_scale, refs.row_max.shape)


def _write_limits(refs: Refs, shape: KernelShape, row: Row, n: Scalar, slot: Scalar) -> None:
    """Writes what `_masked` compares, for each block of a tile: its offset positions, and in the last row a bound.

    A pair is attended iff `0 <= distance < width`, `distance = q_pos - kv_pos - low`. As unsigned integers that is one
    comparison; adding 2^31 to both sides makes it a signed one: `q_pos - (kv_pos + low + 2^31) < width - 2^31`.
    """
    for b in range(shape.blocks):
        positions, bound = _limits(refs, shape, row, n, b, slot)
        for part, position in enumerate(positions):
            refs.limits[b, part] = position
        refs.limits[b, len(positions)] = jnp.full((1, LANES), bound, jnp.int32)


def _limits(refs: Refs, shape: KernelShape, row: Row, n: Scalar, b: int, slot: Scalar):
    """Of place `b` of a tile: offset positions, a list of int32 [1, 128], and the bound."""
    e = n * shape.blocks + b
    start, interval = loads.entry(refs, shape, row, jnp.minimum(e, row.count - 1))
    low, width = refs.intervals[0, 0, interval], refs.intervals[0, 0, MAX_INTERVALS + interval]
    is_full, is_missing = (e < row.full_end) & ((e > 0) | row.is_full), e >= row.count
    bound = jnp.where(is_full, INT_MAX, jnp.where(is_missing, INT_MIN, width + INT_MIN))
    is_partial = jnp.logical_not(is_full | is_missing)
    lane = start & (LANES - 1)
    # Positions arrive in rows of 128 lanes, and a block may start at any lane that is a multiple of 16: two rows are
    # rolled and joined. `roll` takes whole register tiles of 8 sublanes.
    rolled = [
        pltpu.roll(jnp.broadcast_to(refs.pos_rows[slot, b, r], (8, LANES)), (LANES - lane) & (LANES - 1), 1)
        for r in range(shape.block_rows)
    ]
    from_first = lax.broadcasted_iota(jnp.int32, (8, LANES), 1) < LANES - lane
    pairs = zip(rolled[:-1], rolled[1:], strict=True)
    positions = [jnp.where(from_first, a, c) + (low + INT_MIN) for a, c in pairs]
    return [jnp.where(is_partial, p, 0)[:1] for p in positions], bound


def _compute(refs: Refs, shape: KernelShape, slot: Scalar, *, is_dense: bool) -> None:
    """Adds a tile to the sums, some keys at a time; without masks where it is dense.

    Groups of `config.compute_q` queries are independent of each other: the compiler runs the matrix products of one
    at the time of the softmax of another.
    """
    block_q, step = refs.q.shape[1], shape.config.compute_kv if is_dense else shape.config.masked_kv
    group = min(block_q, shape.config.compute_q)
    for begin, q_begin in itertools.product(range(0, shape.config.tile_kv, step), range(0, block_q, group)):
        q_rows = pl.ds(q_begin, group)
        keys, values = _keys_and_values(refs, shape, slot, begin, step)
        scores = _scores(refs.q[0, q_rows], keys)
        if not is_dense:
            scores = _masked(refs, shape, scores, begin, q_rows)
        reference = refs.row_max[q_rows]
        # No maximum and no rescaling: on v6e and 7x the vector unit is nearly as busy as the matrix unit.
        weights = [jnp.exp2(column * shape.score_scale - reference) for column in _columns(scores)]
        refs.row_sum[q_rows] += _tree(jnp.add, weights)
        refs.acc[q_rows] += _weighted(weights, values)


def _keys_and_values(refs: Refs, shape: KernelShape, slot: Scalar, begin: int, step: int):
    groups = pl.ds(begin // START_TOKENS, step // START_TOKENS)
    part = lambda p: refs.kv_tiles[slot, groups, p].reshape(step, LANES)  # noqa: E731
    return (jnp.concatenate([part(p) for p in parts], axis=1) for parts in (shape.k_parts, shape.v_parts))


def _columns(scores: Array) -> list[Array]:
    """Cuts along the keys at every 128: a vector register has 128 lanes, so a cut moves nothing."""
    return [scores[:, at : at + LANES] for at in range(0, scores.shape[1], LANES)]


def _precision(dtype: DTypeLike) -> lax.Precision | None:
    # The matrix unit multiplies bfloat16; float32 takes several passes, and by default gets one.
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _scores(q_td: Array, k_sd: Array) -> Array:
    # Summed over the last axis of both sides. The matrix unit of v6e and 7x is 256 wide: a head dim of 128 fills half
    # of it, here and in `_weighted`.
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(q_td, k_sd, contract, precision=_precision(q_td.dtype), preferred_element_type=jnp.float32)


def _weighted(weights: list[Array], v_sd: Array) -> Array:
    """The sum of values by their weights, given as columns of 128 keys."""
    # Rounded to the values' type column by column: the matrix unit multiplies bfloat16.
    weights_ts = jnp.concatenate([w.astype(v_sd.dtype) for w in weights], axis=1)
    contract = (((1,), (0,)), ((), ()))
    return lax.dot_general(
        weights_ts, v_sd, contract, precision=_precision(v_sd.dtype), preferred_element_type=jnp.float32
    )


def _masked(refs: Refs, shape: KernelShape, scores: Array, begin: int, q_rows: pl.Slice) -> Array:
    """The scores with those of pairs that are not attended replaced, 128 keys at a time."""
    per_block = shape.block_kv // LANES
    q_pos = refs.q_pos_column[q_rows]
    columns = []
    for n, column in enumerate(_columns(scores)):
        block, part = divmod(begin // LANES + n, per_block)
        positions, bound = (jnp.broadcast_to(refs.limits[block, r], q_pos.shape) for r in (part, per_block))
        columns.append(jnp.where(q_pos - positions < bound, column, MASKED_SCORE))
    return jnp.concatenate(columns, axis=1)


def _tree(join: Callable[..., Array], items: list[Array]) -> Array:
    """Joins items pairwise: in a chain each operation would wait for the one before."""
    while len(items) > 1:
        items = [
            join(*pair) if len(pair) == 2 else pair[0] for pair in (items[n : n + 2] for n in range(0, len(items), 2))
        ]
    return items[0]


def _attend_online(refs: Refs, shape: KernelShape, row: Row, num_tiles: Scalar, slot: Scalar) -> None:
    """The q block once more, by an online softmax; its loads wait, and leave the other slot to the next q block."""
    loads.start_piece(refs, shape, row, 0)
    _reset(refs)
    refs.row_max[...] = jnp.full_like(refs.row_max, INITIAL_ROW_MAX)

    @pl.loop(0, num_tiles)
    def _tile(n: Array):
        loads.start_tile(refs, shape, row, n, slot)
        loads.wait_tile(refs, shape, row, n, slot)
        _write_limits(refs, shape, row, n, slot)

        @pl.loop(0, refs.q.shape[1], step=LANES)
        def _rows(q_begin: Array):
            _online_step(refs, shape, slot, pl.ds(pl.multiple_of(q_begin, LANES), LANES))

    refs.row_max[...] *= shape.score_scale


def _online_step(refs: Refs, shape: KernelShape, slot: Scalar, q_rows: pl.Slice) -> None:
    """Adds a tile to the online softmax of some queries."""
    keys, values = _keys_and_values(refs, shape, slot, 0, shape.config.tile_kv)
    scores = _masked(refs, shape, _scores(refs.q[0, q_rows], keys), 0, q_rows)
    # Not yet scaled, as are all scores here: the scale is applied to differences, and to the maximum at the end.
    columns, row_max = _columns(scores), refs.row_max[q_rows]
    new_row_max = jnp.maximum(row_max, jnp.max(_tree(jnp.maximum, columns), axis=1, keepdims=True))
    weights = [jnp.exp2((column - new_row_max) * shape.score_scale) for column in columns]
    rescale = jnp.exp2((row_max - new_row_max) * shape.score_scale)
    refs.row_max[q_rows] = new_row_max
    refs.row_sum[q_rows] = refs.row_sum[q_rows] * rescale + _tree(jnp.add, weights)
    added = _weighted(weights, values)
    refs.acc[q_rows] = refs.acc[q_rows] * _widen(rescale, added.shape[1]) + added


def _widen(column: Array, width: int) -> Array:
    """128 equal lanes repeated to `width` of them."""
    return jnp.concatenate([column] * (width // LANES), axis=1)


def _store(refs: Refs, shape: KernelShape) -> Array:
    """Writes the output and lse, zeros and -inf where nothing was attended; returns whether the sums lost nothing."""
    # Transposed first: the 128 parts are added along sublanes, and the sums lie in a row as the log-sum-exp does.
    row_sum = jnp.sum(refs.row_sum[...].T, axis=0, keepdims=True)
    is_empty = row_sum == 0
    divisor = jnp.where(is_empty, 1.0, row_sum)
    lse = refs.row_max[...].T[:1] * float(np.log(2.0)) + jnp.log(divisor)
    refs.lse[0] = jnp.where(is_empty, -jnp.inf, lse)
    factor = jnp.broadcast_to(1.0 / divisor, (LANES, divisor.shape[1])).T  # divided as a row: a column has 128 times it
    width = refs.out.shape[2]
    refs.out[0] = (refs.acc[:, :width] * _widen(factor, refs.acc.shape[1])[:, :width]).astype(refs.out.dtype)
    low, high = SAFE_SUM_RANGE
    is_right = (is_empty & (refs.q_pos[0] < 0)) | ((row_sum >= low) & (row_sum <= high))
    # Values above 2^31 can overflow the accumulator within the safe range of sums; NaN fails this comparison too.
    is_finite = jnp.abs(refs.acc[...]) < jnp.inf
    return (jnp.min(is_right.astype(jnp.float32)) > 0) & (jnp.min(is_finite.astype(jnp.float32)) > 0)
