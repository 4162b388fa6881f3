"""The arrays of the TPU kernel, and the DMAs that bring a q block's list and its kv blocks from HBM.

A q block's list comes to SMEM in pieces of 512 entries, a ring of four, the next piece while one is read. Its entries
are taken in a rotated order, the last one first and then the others in the order of the list:

    list    full 0   full 1   full 2 ... full 14   partial 15           tile 0   15  0  1  2  3  4  5  6
                                                                        tile 1    7  8  9 10 11 12 13 14

The last entry is the one on the diagonal and the first the start of the prompt in the patterns that are used: one tile
holds a sample of near and of far keys (see `_choose_reference` of the kernel).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu.tpu_config import (
    LANES,
    PIECE_ENTRIES,
    PIECES,
    RING_ENTRIES,
    START_TOKENS,
    TpuConfig,
)
from pallas_kernels.notation import Array, Ref, Scalar

LANE_BITS = LANES.bit_length() - 1
"""Shifts and masks instead of divisions: signed ones cost the scalar unit several instructions each."""

PIECE_BITS = PIECE_ENTRIES.bit_length() - 1
"""Shift from an entry to its piece."""

START_BITS = START_TOKENS.bit_length() - 1
"""Shift from a row of what is gathered to its group of 16, which an entry's interval does not reach."""

FIRST, NUM_FULL, COUNT, POS_ROW, LAST = range(5)
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
      list_entries, pos_rows: entries of one head's list, and rows of 128 positions in one row of `kv_pos`.
      v_parts, k_parts: which 128 lanes of a gathered row hold values and keys.
      score_scale: factor on the scores, for base-2 exponentials.
    """

    config: TpuConfig
    block_kv: int
    num_q_blocks: int
    heads_per_kv_head: int
    num_shared: int
    num_extra: int
    list_entries: int
    pos_rows: int
    v_parts: tuple[int, ...]
    k_parts: tuple[int, ...]
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
    row: Ref
    next_row: Ref
    intervals: Ref
    q: Ref
    q_pos: Ref
    entries: Ref
    kv: Ref
    kv_pos: Ref
    # Outputs.
    out: Ref
    lse: Ref
    # Scratch.
    kv_tiles: Ref
    pos_rows: Ref
    acc: Ref
    row_max: Ref
    row_sum: Ref
    q_pos_column: Ref
    limits: Ref
    lists: Ref
    slot: Ref
    kv_arrived: Ref
    pos_arrived: Ref
    list_arrived: Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The list of one q block: scalars of its head and of itself, and which ring of SMEM holds its entries."""

    kv_head: Array
    gathered_offset: Array
    list_begin: Array
    first: Array
    num_full: Array
    count: Array
    pos_row: Array
    last: Array
    ring: Array

    @property
    def offset(self) -> Array:
        """Lane of the list's first entry in its row of 128."""
        return self.first & (LANES - 1)

    @property
    def is_full(self) -> Array:
        """Whether all entries are full: else the one that is taken first is partial."""
        return self.num_full == self.count

    @property
    def full_end(self) -> Array:
        """Where the full entries end in the order they are taken in; the very first may be partial."""
        return jnp.minimum(self.num_full + 1, self.count)

    def is_dense(self, shape: KernelShape, n: Scalar) -> Array:
        """Whether tile `n` holds full blocks alone; the first tile counts as mixed."""
        return (n > 0) & ((n + 1) * shape.blocks <= self.full_end)


def read_row(ref: Ref, shape: KernelShape, i: Array) -> Row:
    """The row of q block `i` of this head."""
    field = lambda name: ref[0, 0, name]  # noqa: E731
    head = pl.program_id(0)
    return Row(
        kv_head=lax.div(head, shape.heads_per_kv_head),
        gathered_offset=lax.rem(head, shape.heads_per_kv_head) * shape.num_extra,
        list_begin=head * shape.list_entries,
        first=field(FIRST),
        num_full=field(NUM_FULL),
        count=field(COUNT),
        pos_row=field(POS_ROW),
        last=field(LAST),
        # Two rings, in alternation: the next q block's list arrives while this one's is read.
        ring=i & 1,
    )


def start_piece(refs: Refs, shape: KernelShape, row: Row, piece: Scalar) -> None:
    """Starts the copy of 512 entries of a list from HBM to SMEM, if the list reaches that far."""

    @pl.when((row.count > 0) & (piece * PIECE_ENTRIES < row.offset + row.count))
    def _start():
        # From the multiple of 128 before the list's first entry, as a slice along lanes must start at one.
        begin = row.list_begin + (row.first & -LANES) + piece * PIECE_ENTRIES
        _piece_copy(refs, row, piece, begin).start()


def _piece_copy(refs: Refs, row: Row, piece: Scalar, begin: Any) -> Ref:
    place = piece & (PIECES - 1)
    return pltpu.make_async_copy(
        refs.entries.at[0, pl.ds(pl.multiple_of(begin, LANES), PIECE_ENTRIES)],
        refs.lists.at[pl.ds(pl.multiple_of(row.ring * RING_ENTRIES + place * PIECE_ENTRIES, LANES), PIECE_ENTRIES)],
        refs.list_arrived.at[row.ring, place],
    )


def _listed(refs: Refs, row: Row, e: Scalar) -> Array:
    """Entry `e` of the list, its piece having arrived."""
    at = row.offset + e
    return refs.lists[row.ring * RING_ENTRIES + (at & (RING_ENTRIES - 1))]


def _taken(refs: Refs, row: Row, e: Scalar) -> Array:
    """The `e`-th entry to be taken, its piece having arrived."""
    return jnp.where(e == 0, row.last, _listed(refs, row, e - 1))


def entry(refs: Refs, shape: KernelShape, row: Row, e: Scalar) -> tuple[Array, Array]:
    """Of the `e`-th entry to be taken: the block's start in the kv view and the number of its interval."""
    value = _taken(refs, row, e)
    start = value & -START_TOKENS
    if shape.num_extra:
        start = start - jnp.where(start >= shape.num_shared, row.gathered_offset, 0)
    return start, value & (START_TOKENS - 1)


def start_next(
    refs: Refs, shape: KernelShape, row: Row, following: Row, n: Scalar, num_tiles: Scalar, slot: Scalar
) -> None:
    """Starts the loads of the tile after tile `n`: of this q block, or the first of the next one."""

    # The usual tile, full and within its piece of the list, has a path without branches, its DMAs unrolled: they are
    # most of the scalar unit's work between two tiles.
    is_dense = row.is_dense(shape, n + 1) & jnp.logical_not(_reaches_next_piece(shape, row, n + 1))

    @pl.when(is_dense)
    def _dense():
        for b in range(shape.blocks):
            _kv_copy(refs, shape, row, _listed(refs, row, (n + 1) * shape.blocks + b - 1), b, slot).start()

    @pl.when(jnp.logical_not(is_dense))
    def _mixed():
        @pl.when(n + 1 < num_tiles)
        def _same():
            start_tile(refs, shape, row, n + 1, slot)

        @pl.when((n + 1 == num_tiles) & (following.count > 0))
        def _following():
            start_tile(refs, shape, following, 0, slot)


def _reaches_next_piece(shape: KernelShape, row: Row, n: Scalar) -> Array:
    """Whether tile `n` is the first that needs its piece of the list."""
    before = row.offset + n * shape.blocks - 1
    end = jnp.minimum(before + shape.blocks, row.offset + row.count - 1)
    return (n == 0) | (end >> PIECE_BITS > before >> PIECE_BITS)


def start_tile(refs: Refs, shape: KernelShape, row: Row, n: Scalar, slot: Scalar) -> None:
    """Starts the loads of a tile: its kv blocks, and key positions where they are partial."""
    begin = n * shape.blocks
    end = jnp.minimum(begin + shape.blocks, row.count)

    @pl.when(_reaches_next_piece(shape, row, n))
    def _next_piece():  # a tile reaches one at most: VMEM holds fewer blocks than a piece has entries
        piece = (row.offset + end - 1) >> PIECE_BITS
        _piece_copy(refs, row, piece, 0).wait()
        start_piece(refs, shape, row, piece + 1)

    @pl.when(end - begin == shape.blocks)
    def _whole():
        for b in range(shape.blocks):
            _kv_copy(refs, shape, row, _taken(refs, row, begin + b), b, slot).start()

    @pl.when(end - begin < shape.blocks)
    def _part():
        @pl.loop(0, end - begin)
        def _block(b: Array):
            _kv_copy(refs, shape, row, _taken(refs, row, begin + b), b, slot).start()

    _for_partial(shape, row, n, lambda b: _pos_copy(refs, shape, row, begin + b, b, slot).start())


def _for_partial(shape: KernelShape, row: Row, n: Scalar, act: Callable[[Scalar], None]) -> None:
    """Calls `act` with the place of each partial block of a tile."""
    begin = n * shape.blocks

    @pl.when((n == 0) & jnp.logical_not(row.is_full))
    def _first():
        act(0)

    @pl.loop(jnp.maximum(row.full_end - begin, 0), jnp.minimum(row.count - begin, shape.blocks))
    def _rest(b: Array):
        act(b)


def _kv_copy(refs: Refs, shape: KernelShape, row: Row, value: Array, b: Scalar, slot: Scalar) -> Ref:
    """The copy of an entry's block to place `b` of a tile; the entry's interval, in its low bits, is shifted out."""
    # Any multiple of 16 rows will do as a start; from other rows a DMA of bfloat16 does not compile.
    groups = pl.ds(value >> START_BITS, shape.block_kv // START_TOKENS)
    return pltpu.make_async_copy(
        refs.kv.at[row.kv_head, groups], refs.kv_tiles.at[slot, _place(shape, b)], refs.kv_arrived.at[slot]
    )


def _place(shape: KernelShape, b: Scalar) -> pl.Slice:
    """The groups of 16 rows of place `b` of a tile."""
    groups = shape.block_kv // START_TOKENS
    return pl.ds(b * groups, groups)


def _pos_copy(refs: Refs, shape: KernelShape, row: Row, e: Scalar, b: Scalar, slot: Scalar) -> Ref:
    """The copy of the aligned rows of 128 positions that hold those of the block that is taken `e`-th."""
    start, _ = entry(refs, shape, row, e)
    # Whole rows of 128 positions: slices along lanes start at multiples of 128, and the block may not.
    begin = row.pos_row * shape.pos_rows + (start >> LANE_BITS)
    return pltpu.make_async_copy(
        refs.kv_pos.at[pl.ds(begin, shape.block_rows)], refs.pos_rows.at[slot, b], refs.pos_arrived.at[slot]
    )


def wait_dense(refs: Refs, slot: Scalar) -> None:
    """Waits for all blocks of a tile."""
    _wait(refs.kv_tiles.at[slot], refs.kv_arrived.at[slot])


def _wait(ref: Ref, arrived: Ref) -> None:
    pltpu.make_async_copy(ref, ref, arrived).wait()  # a wait counts bytes: any copy of that size will do


def wait_tile(refs: Refs, shape: KernelShape, row: Row, n: Scalar, slot: Scalar) -> None:
    """Waits for a tile's blocks and positions; zeros the places without a block."""
    num_blocks = jnp.minimum(row.count - n * shape.blocks, shape.blocks)

    @pl.when(num_blocks == shape.blocks)
    def _whole():
        wait_dense(refs, slot)

    @pl.when(num_blocks < shape.blocks)
    def _part():
        @pl.loop(0, num_blocks)
        def _present(b: Array):
            _wait(refs.kv_tiles.at[slot, _place(shape, b)], refs.kv_arrived.at[slot])

        @pl.loop(num_blocks, shape.blocks)
        def _missing(b: Array):  # a weight of 0 times NaN is NaN
            groups = shape.block_kv // START_TOKENS
            refs.kv_tiles[slot, _place(shape, b)] = jnp.zeros((groups, *refs.kv_tiles.shape[2:]), refs.kv_tiles.dtype)

    _for_partial(shape, row, n, lambda b: _wait(refs.pos_rows.at[slot, b], refs.pos_arrived.at[slot]))
