"""The body of the TPU kernel: scattered kv blocks gathered by DMA into one large VMEM tile, computed as a dense one.

One grid step is one q block of one head. Its list is cut into tiles of `config.tile_kv` rows; while one tile is
computed the DMAs of the next one run, and behind a q block's last tile those of the next q block's first, whose list
was brought to SMEM meanwhile:

    DMA      tile 1      tile 2      next q block's tile 0
    compute  tile 0      tile 1      tile 2                 store

Tiles of full blocks alone are computed without a mask. The tile that follows them may mix full, partial and missing
blocks; each of its blocks obeys `0 <= q_pos - kv_pos - low < width`, one comparison of offset integers (see `_masked`).
The running sum stays spread over 128 lanes until the end (Dao et al. 2022, "FlashAttention", Algorithm 1).
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_config import (
    LANES,
    MAX_INTERVALS,
    PIECE_ENTRIES,
    PIECE_ROWS,
    PIECES,
    RING_ROWS,
    START_TOKENS,
    TpuConfig,
)

MASKED = -1e38
"""A masked score: finite, and far below `LOWEST`, so that its weight is an exact 0."""

LOWEST = -1e30
"""The running maximum before the first attended key; below every real score."""

LANE_BITS = LANES.bit_length() - 1
"""Shifts and masks instead of divisions: signed ones cost the scalar unit several instructions each."""

INT_MIN, INT_MAX = np.iinfo(np.int32).min, np.iinfo(np.int32).max

FIRST, NUM_FULL, COUNT, POS_ROW = range(4)
"""Fields of a q block's row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelShape:
    """What the body knows when it is traced.

    Args:
      config: tile sizes.
      block_kv: kv rows of one list entry.
      num_q_blocks: q blocks of a head.
      heads_per_kv_head: query heads that share one kv head.
      num_shared, num_extra: kv rows all heads of a kv head share, and those of each query head behind them.
      list_rows, pos_rows: rows of 128 entries in one head's list, and of 128 positions in one row of `kv_pos`.
      v_lanes, k_lanes: `(begin, end)` of values and keys in a gathered row.
      score_scale: factor on the scores, for base-2 exponentials.
    """

    config: TpuConfig
    block_kv: int
    num_q_blocks: int
    heads_per_kv_head: int
    num_shared: int
    num_extra: int
    list_rows: int
    pos_rows: int
    v_lanes: tuple[int, int]
    k_lanes: tuple[int, int]
    score_scale: float

    @property
    def blocks(self) -> int:
        """Entries of one tile."""
        return self.config.tile_kv // self.block_kv

    @property
    def block_rows(self) -> int:
        """Rows of 128 positions that hold a block's positions wherever it starts."""
        return self.block_kv // LANES + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Every array of the kernel by name."""

    # Inputs: SMEM, VMEM, then HBM.
    row: Any
    next_row: Any
    intervals: Any
    q: Any
    q_pos: Any
    entries: Any
    kv: Any
    kv_pos: Any
    # Outputs.
    out: Any
    lse: Any
    # Scratch.
    kv_tiles: Any
    pos_rows: Any
    acc: Any
    top: Any
    total: Any
    q_pos_column: Any
    lists: Any
    slot: Any
    kv_arrived: Any
    pos_arrived: Any
    list_arrived: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The list of one q block: scalars of its head, of its own, and which ring of SMEM holds its entries."""

    kv_head: Any
    own_rows: Any
    list_begin: Any
    first: Any
    num_full: Any
    count: Any
    pos_row: Any
    ring: Any

    @property
    def offset(self):
        """Lane of the first entry in its row of 128."""
        return self.first & (LANES - 1)


def attention_kernel(refs: Refs, shape: KernelShape) -> None:
    """Attention of one q block of one head, and the first loads of the next q block."""
    i = pl.program_id(1)
    row, following = _row(refs.row, shape, i), _row(refs.next_row, shape, i + 1)
    following = dataclasses.replace(following, count=jnp.where(i + 1 < shape.num_q_blocks, following.count, 0))

    @pl.when(i == 0)
    def _first_of_a_head():
        refs.slot[0] = 0
        _start_piece(refs, shape, row, 0)

        @pl.when(row.count > 0)
        def _start():
            _start_tile(refs, shape, row, 0, 0)

    _start_piece(refs, shape, following, 0)
    _reset(refs)
    num_tiles = pl.cdiv(row.count, shape.blocks)

    @pl.when((num_tiles == 0) & (following.count > 0))
    def _nothing_to_compute():
        _start_tile(refs, shape, following, 0, refs.slot[0])

    @pl.when(row.count > row.num_full - lax.rem(row.num_full, shape.blocks))
    def _has_masked_tiles():
        refs.q_pos_column[...] = jnp.broadcast_to(refs.q_pos[0], (LANES, refs.q.shape[1])).T

    def tile(n, slot):
        _start_next(refs, shape, row, following, n, num_tiles, 1 - slot)
        _wait_tile(refs, shape, row, n, slot)
        is_dense = (n + 1) * shape.blocks <= row.num_full

        @pl.when(is_dense)
        def _dense():
            _compute(refs, shape, slot, None)

        @pl.when(jnp.logical_not(is_dense))
        def _with_mask():
            _compute(refs, shape, slot, [_limits(refs, shape, row, n, b, slot) for b in range(shape.blocks)])

        return 1 - slot

    refs.slot[0] = lax.fori_loop(0, num_tiles, tile, refs.slot[0])
    _store(refs, shape)


def _row(ref, shape: KernelShape, i) -> Row:
    field = lambda name: ref[0, 0, name]  # noqa: E731
    head = pl.program_id(0)
    return Row(
        kv_head=lax.div(head, shape.heads_per_kv_head),
        own_rows=lax.rem(head, shape.heads_per_kv_head) * shape.num_extra,
        list_begin=head * shape.list_rows,
        first=field(FIRST),
        num_full=field(NUM_FULL),
        count=field(COUNT),
        pos_row=field(POS_ROW),
        ring=lax.rem(i, 2),
    )


def _start_piece(refs: Refs, shape: KernelShape, row: Row, piece) -> None:
    """Starts the copy of 512 entries of a list from HBM to SMEM, if the list reaches that far."""

    @pl.when((row.count > 0) & (piece * PIECE_ENTRIES < row.offset + row.count))
    def _start():
        begin = row.list_begin + (row.first >> LANE_BITS) + piece * PIECE_ROWS
        _piece_copy(refs, row, piece, begin).start()


def _piece_copy(refs: Refs, row: Row, piece, begin):
    place = piece & (PIECES - 1)
    return pltpu.make_async_copy(
        refs.entries.at[pl.ds(begin, PIECE_ROWS)],
        refs.lists.at[row.ring, pl.ds(place * PIECE_ROWS, PIECE_ROWS)],
        refs.list_arrived.at[row.ring, place],
    )


def _entry(refs: Refs, row: Row, e):
    """Entry `e` of a row whose piece has arrived: the block's start and the number of its interval."""
    at = row.offset + e
    value = refs.lists[row.ring, (at >> LANE_BITS) & (RING_ROWS - 1), 0, at & (LANES - 1)]
    return value & -START_TOKENS, value & (START_TOKENS - 1)


def _start_next(refs: Refs, shape: KernelShape, row: Row, following: Row, n, num_tiles, slot) -> None:
    """Starts the loads of the tile after tile `n`: of this q block, or the first of the next one."""
    stays = n + 1 < num_tiles
    pick = lambda a, b: jnp.where(stays, a, b)  # noqa: E731
    chosen = Row(**{f.name: pick(getattr(row, f.name), getattr(following, f.name)) for f in dataclasses.fields(Row)})

    @pl.when(chosen.count > 0)
    def _start():
        _start_tile(refs, shape, chosen, pick(n + 1, 0), slot)


def _start_tile(refs: Refs, shape: KernelShape, row: Row, n, slot) -> None:
    """Starts the loads of a tile: its kv blocks, and key positions where they are partial."""
    begin = n * shape.blocks
    end = jnp.minimum(begin + shape.blocks, row.count)
    piece = lax.div(row.offset + end - 1, PIECE_ENTRIES)

    @pl.when((n == 0) | (piece > lax.div(row.offset + begin - 1, PIECE_ENTRIES)))
    def _next_piece():  # a tile reaches one at most: VMEM holds fewer blocks than a piece has entries
        _piece_copy(refs, row, piece, 0).wait()
        _start_piece(refs, shape, row, piece + 1)

    @pl.when(end - begin == shape.blocks)
    def _whole():
        for b in range(shape.blocks):
            _kv_copy(refs, shape, row, begin + b, b, slot).start()

    @pl.when(end - begin < shape.blocks)
    def _part():
        @pl.loop(0, end - begin)
        def _block(b):
            _kv_copy(refs, shape, row, begin + b, b, slot).start()

    @pl.loop(jnp.maximum(row.num_full - begin, 0), end - begin)
    def _positions(b):
        _pos_copy(refs, shape, row, begin + b, b, slot).start()


def _kv_copy(refs: Refs, shape: KernelShape, row: Row, e, b, slot):
    """The copy of entry `e`'s block to place `b` of a tile."""
    start, _ = _entry(refs, row, e)
    if shape.num_extra:
        start = start + jnp.where(start >= shape.num_shared, row.own_rows, 0)
    rows = pl.ds(pl.multiple_of(start, START_TOKENS), shape.block_kv)
    return pltpu.make_async_copy(
        refs.kv.at[row.kv_head, rows],
        refs.kv_tiles.at[slot, pl.ds(pl.multiple_of(b * shape.block_kv, shape.block_kv), shape.block_kv)],
        refs.kv_arrived.at[slot],
    )


def _pos_copy(refs: Refs, shape: KernelShape, row: Row, e, b, slot):
    """The copy of the aligned rows of 128 positions that hold those of entry `e`'s block."""
    start, _ = _entry(refs, row, e)
    begin = row.pos_row * shape.pos_rows + (start >> LANE_BITS)
    return pltpu.make_async_copy(
        refs.kv_pos.at[pl.ds(begin, shape.block_rows)], refs.pos_rows.at[slot, b], refs.pos_arrived.at[slot]
    )


def _wait_tile(refs: Refs, shape: KernelShape, row: Row, n, slot) -> None:
    """Waits for a tile's blocks and positions; zeros the values of places without a block."""
    begin = n * shape.blocks
    num_blocks = jnp.minimum(row.count - begin, shape.blocks)

    def wait(ref, arrived):
        pltpu.make_async_copy(ref, ref, arrived.at[slot]).wait()  # a wait counts bytes: any copy of that size will do

    block = lambda b: pl.ds(pl.multiple_of(b * shape.block_kv, shape.block_kv), shape.block_kv)  # noqa: E731

    @pl.when(num_blocks == shape.blocks)
    def _whole():
        wait(refs.kv_tiles.at[slot], refs.kv_arrived)

    @pl.when(num_blocks < shape.blocks)
    def _part():
        @pl.loop(0, num_blocks)
        def _present(b):
            wait(refs.kv_tiles.at[slot, block(b)], refs.kv_arrived)

        @pl.loop(num_blocks, shape.blocks)
        def _missing(b):  # a weight of 0 does not silence a NaN
            refs.kv_tiles[slot, block(b)] = jnp.zeros((shape.block_kv, refs.kv_tiles.shape[2]), refs.kv_tiles.dtype)

    @pl.loop(jnp.maximum(row.num_full - begin, 0), num_blocks)
    def _positions(b):
        wait(refs.pos_rows.at[slot, b], refs.pos_arrived)


def _limits(refs: Refs, shape: KernelShape, row: Row, n, b: int, slot):
    """What `_masked` compares for place `b` of a tile: offset positions, a list of int32 [1, 128], and a bound.

    A pair is attended iff `0 <= distance < width`, `distance = q_pos - kv_pos - low`. As unsigned integers that is one
    comparison; adding 2^31 to both sides makes it a signed one: `q_pos - (kv_pos + low + 2^31) < width - 2^31`.
    """
    e = n * shape.blocks + b
    start, interval = _entry(refs, row, jnp.minimum(e, row.count - 1))
    low, width = refs.intervals[0, 0, interval], refs.intervals[0, 0, MAX_INTERVALS + interval]
    is_full, is_missing = e < row.num_full, e >= row.count
    bound = jnp.where(is_full, INT_MAX, jnp.where(is_missing, INT_MIN, width + INT_MIN))
    is_partial = jnp.logical_not(is_full | is_missing)
    lane = start & (LANES - 1)
    rolled = [
        pltpu.roll(jnp.broadcast_to(refs.pos_rows[slot, b, r], (8, LANES)), (LANES - lane) & (LANES - 1), 1)
        for r in range(shape.block_rows)
    ]
    from_first = lax.broadcasted_iota(jnp.int32, (8, LANES), 1) < LANES - lane
    pairs = zip(rolled[:-1], rolled[1:], strict=True)
    positions = [jnp.where(from_first, a, c) + (low + INT_MIN) for a, c in pairs]
    return [jnp.where(is_partial, p, 0)[:1] for p in positions], bound


def _reset(refs: Refs) -> None:
    refs.acc[...] = jnp.zeros_like(refs.acc)
    refs.top[...] = jnp.full_like(refs.top, LOWEST)
    refs.total[...] = jnp.zeros_like(refs.total)


def _compute(refs: Refs, shape: KernelShape, slot, limits) -> None:
    """Adds a tile to the running softmax, `config.compute_kv` keys at a time; `limits` is None where all is full.

    Groups of `config.compute_q` queries are independent of each other: the compiler runs the matrix products of one
    beside the softmax of another.
    """
    block_q, step = refs.q.shape[1], shape.config.compute_kv
    group = min(block_q, shape.config.compute_q)
    steps = list(itertools.product(range(0, shape.config.tile_kv, step), range(0, block_q, group)))

    def scores_of(begin, q_begin):
        keys = refs.kv_tiles[slot, pl.ds(begin, step), pl.ds(*_span(shape.k_lanes))]
        return _scores(refs.q[0, pl.ds(q_begin, group)], keys)

    following = scores_of(*steps[0])
    for n, (begin, q_begin) in enumerate(steps):
        scores, q_rows = following, pl.ds(q_begin, group)
        if n + 1 < len(steps):
            following = scores_of(*steps[n + 1])
        if limits is not None:
            scores = _masked(scores, begin, limits, shape, refs.q_pos_column[q_rows])
        weights, decay = _softmax_update(refs, shape, q_rows, scores)
        values = refs.kv_tiles[slot, pl.ds(begin, step), pl.ds(*_span(shape.v_lanes))]
        _accumulate(refs, q_rows, weights, decay, values)


def _span(lanes):
    begin, end = lanes
    return begin, end - begin


def _precision(dtype):
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _scores(q_td, k_sd):
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(q_td, k_sd, contract, precision=_precision(q_td.dtype), preferred_element_type=jnp.float32)


def _masked(scores, begin: int, limits, shape: KernelShape, q_pos):
    """The scores with those of pairs that are not attended replaced, 128 keys at a time."""
    per_block = shape.block_kv // LANES
    columns = []
    for at in range(0, scores.shape[1], LANES):
        block, part = divmod((begin + at) // LANES, per_block)
        positions, bound = limits[block]
        is_attended = q_pos - jnp.broadcast_to(positions[part], q_pos.shape) < bound
        columns.append(jnp.where(is_attended, scores[:, at : at + LANES], MASKED))
    return jnp.concatenate(columns, axis=1)


def _softmax_update(refs: Refs, shape: KernelShape, q_rows, scores):
    """Updates the running maximum and sum; returns the unnormalised weights and the decay of what was accumulated."""
    columns = [scores[:, at : at + LANES] for at in range(0, scores.shape[1], LANES)]
    top = refs.top[q_rows]
    highest = jnp.max(_tree(jnp.maximum, columns), axis=1, keepdims=True)
    new_top = jnp.maximum(top, highest)
    offset = new_top * shape.score_scale
    weights = [jnp.exp2(column * shape.score_scale - offset) for column in columns]
    decay = jnp.exp2((top - new_top) * shape.score_scale)
    refs.top[q_rows] = new_top
    refs.total[q_rows] = refs.total[q_rows] * decay + _tree(jnp.add, weights)
    return jnp.concatenate([w.astype(refs.q.dtype) for w in weights], axis=1), decay


def _tree(join, items):
    """Joins items pairwise: a chain would wait for each result in turn."""
    while len(items) > 1:
        items = [
            join(*pair) if len(pair) == 2 else pair[0] for pair in (items[n : n + 2] for n in range(0, len(items), 2))
        ]
    return items[0]


def _accumulate(refs: Refs, q_rows, weights, decay, v_sd) -> None:
    added = lax.dot_general(
        weights,
        v_sd,
        (((1,), (0,)), ((), ())),
        precision=_precision(weights.dtype),
        preferred_element_type=jnp.float32,
    )
    width = added.shape[1]
    decay = decay if width == LANES else jnp.concatenate([decay] * (width // LANES), axis=1)
    refs.acc[q_rows] = refs.acc[q_rows] * decay + added


def _store(refs: Refs, shape: KernelShape) -> None:
    """The output and lse of the q block; zeros and -inf where nothing was attended."""
    total = jnp.sum(refs.total[...], axis=1, keepdims=True)
    is_empty = total == 0
    total = jnp.where(is_empty, 1.0, total)
    width = refs.out.shape[2]
    refs.out[0] = (refs.acc[:, :width] / total).astype(refs.out.dtype)
    lse = refs.top[...] * (shape.score_scale * float(np.log(2.0))) + jnp.log(total)
    lse = jnp.where(is_empty, -jnp.inf, lse)
    refs.lse[0] = lse.T[:1]
