"""The producer warpgroup of the Hopper kernel: copies q tiles, their table rows and kv tiles as buffers come free."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.hopper.gpu_config import COMPUTE_WARPGROUPS, ROW_FIELDS, STAGGERED_BLOCKS, WARPGROUP_ROWS
from pallas_kernels.attention.hopper.kernel_refs import (
    COUNT,
    FIRST,
    HEAD,
    NUM_FULL,
    POS_ROW,
    Q_START,
    KernelShape,
    Refs,
    tiles_of,
)
from pallas_kernels.attention.hopper.tile_scheduler import row_of
from pallas_kernels.notation import Array, Ref


def load(refs: Refs, shape: KernelShape) -> None:
    """Copies every q tile, its table row and its kv tiles, as buffers come free."""
    program = lax.axis_index("program")
    # The scheduler's whole answer for one thread block is three numbers: no counter is shared, nothing is locked.
    span = tuple(refs.assignment[n] for n in (0, program + 1, program + 2))

    def q_tile(carry: tuple[Array, Array, Array]):
        n, tile, _ = carry
        table_row = row_of(program, n, span, shape.num_programs, shape.num_rows)
        _load_q(refs, shape, n, table_row)
        num_tiles = tiles_of(shape, refs.table[table_row, COUNT])
        _load_kv(refs, shape, table_row, tile, num_tiles)
        return n + 1, tile + num_tiles, num_tiles

    zero = jnp.int32(0)
    # The row that ends the table is copied too, and its kv tiles are none: from it the consumers learn the end.
    _, tile, _ = lax.while_loop(lambda carry: carry[2] > 0, q_tile, (zero, zero, jnp.int32(1)))
    _wait_until_free(refs, shape, tile)


def _wait_until_free(refs: Refs, shape: KernelShape, tile: Array) -> None:
    """Leaves no barrier half observed: waits for the buffers that are not filled again."""
    config = shape.config
    # A wait takes a barrier's phases one by one, their parity in a register. Interpret mode insists that each completed
    # phase is observed before the kernel ends (docs/log.md of 2026-11-22).
    slots = [("k_free", slot) for slot in range(config.num_k_stages)]
    slots += [("v_free", slot) for slot in range(config.num_v_stages)]
    for name, slot in slots:

        @pl.when(tile > slot)
        def _wait(name: str = name, slot: int = slot):
            plgpu.barrier_wait(refs.barriers[name].at[slot])


def _load_q(refs: Refs, shape: KernelShape, n: Array, table_row: Array) -> None:
    """Copies the n-th q tile and its table row once the output that had its buffer has left."""
    slot = n % shape.config.num_q_buffers
    head, q_start = refs.table[table_row, HEAD], refs.table[table_row, Q_START]
    ready = refs.barriers["q_ready"].at[slot]

    @pl.when(n >= shape.config.num_q_buffers)
    def _wait():
        plgpu.barrier_wait(refs.barriers["q_free"].at[slot])

    # 128 bytes of the table: TMA writes to shared memory at multiples of 128 (PTX ISA, "cp.async.bulk.tensor").
    table_slot = refs.smem["ints"].at[shape.config.num_k_stages, pl.ds(_row_offset(slot), ROW_FIELDS)]
    plgpu.copy_gmem_to_smem(refs.table.at[table_row], table_slot, ready)
    # One copy per consumer warpgroup: its 64 rows, wgmma's M, lie together.
    for w in range(COMPUTE_WARPGROUPS):
        rows = pl.ds(pl.multiple_of(q_start + w * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(refs.q.at[head, rows], refs.smem["q"].at[slot, w], ready)


def _load_kv(refs: Refs, shape: KernelShape, table_row: Array, tile: Array, num_tiles: Array) -> None:
    """Copies the kv tiles of a q tile, which are `tile, tile + 1, ...` of this thread block; K goes one ahead of V."""
    config = shape.config
    head, first, num_full_blocks, num_blocks, pos_row = (
        refs.table[table_row, c] for c in (HEAD, FIRST, NUM_FULL, COUNT, POS_ROW)
    )
    num_full = num_full_blocks * shape.tiles_per_block
    # Neighbours start `stagger` blocks apart, 1 or none: further apart the window of keys in use leaves L2 (1 apart 632
    # to 643 TFLOP/s, 7 apart 558 to 565; H100, 32/8 heads at 128K tokens, docs/log.md of 2026-11-25).
    shift = lax.axis_index("program") * config.stagger % jnp.maximum(num_full_blocks, 1)
    shift = jnp.where(num_full_blocks >= STAGGERED_BLOCKS, shift, 0)

    def step(j: Array, last_start: Array) -> Array:
        block = j // shape.tiles_per_block
        block = jnp.where(block < num_full_blocks, _rotated(block + shift, num_full_blocks), block)
        entry = jnp.minimum(first + block, shape.num_entries - 1)
        # An empty row's masked tile may be any: the entry that its `first` names is no row's and may hold anything.
        start = jnp.where(num_blocks > 0, refs.start[head, entry], 0) + j % shape.tiles_per_block * config.tile_kv

        @pl.when(j < num_tiles)
        def _k():
            slot = _copy_tile(refs, shape, "k", head, start, tile + j)

            @pl.when(j >= num_full)
            def _positions():  # k_free has said that the positions in this slot were read too
                # Starts are multiples of 16 positions. One that is no multiple of 4 of them, 16 bytes, ends in an
                # illegal instruction on the device (docs/log.md of 2026-11-25).
                source = refs.kv_pos.at[pos_row, pl.ds(_aligned(start), config.tile_kv)]
                plgpu.copy_gmem_to_smem(source, refs.smem["ints"].at[slot], refs.barriers["pos_ready"].at[slot])

        @pl.when(j > 0)
        def _v():
            _copy_tile(refs, shape, "v", head, last_start, tile + j - 1)

        return start

    # One step more than tiles: V of a tile is copied after K of the next one, in the order in which they are read.
    lax.fori_loop(0, jnp.where(num_tiles > 0, num_tiles + 1, 0), step, jnp.int32(0))


def _rotated(block: Array, num_blocks: Array) -> Array:
    """Full blocks in another order, so that thread blocks with the same list do not all read one block at one time.

    One block apart 662 and 644 TFLOP/s, in step 654 and 611, at 32K and 128K tokens (H100, docs/log.md of 2026-11-25).
    """
    return jnp.where(block >= num_blocks, block - num_blocks, block)


def _copy_tile(refs: Refs, shape: KernelShape, name: str, head: Array, start: Array, tile: Array) -> Array:
    """Copies rows from `start` on, shared or gathered for the head, once the slot of `tile` is free: that slot."""
    num_stages = refs.smem[name].shape[0]
    slot = tile % num_stages
    # One TMA box: up to 256 elements a side, strides in bytes multiples of 16, coordinates in elements, so that a tile
    # may start at any row (CUDA driver API, cuTensorMapEncodeTiled). The arrays have a descriptor each, hence a branch.
    copy: dict[str, Ref] = dict(barrier=refs.barriers[name + "_ready"].at[slot], dst=refs.smem[name].at[slot])
    shared, extra = (refs.k, refs.k_extra) if name == "k" else (refs.v, refs.v_extra)

    @pl.when(tile >= num_stages)
    def _wait():
        plgpu.barrier_wait(refs.barriers[name + "_free"].at[slot])

    @pl.when(start < shape.num_shared)
    def _shared():
        rows = pl.ds(_aligned(start), shape.config.tile_kv)
        plgpu.copy_gmem_to_smem(shared.at[head // shape.heads_per_kv_head, rows], **copy)

    if shape.has_extra:

        @pl.when(start >= shape.num_shared)
        def _extra():
            rows = pl.ds(_aligned(start - shape.num_shared), shape.config.tile_kv)
            plgpu.copy_gmem_to_smem(extra.at[head, rows], **copy)

    return slot


def _row_offset(slot: Array) -> Array:
    return pl.multiple_of(slot * ROW_FIELDS, ROW_FIELDS)


def _aligned(start: Array) -> Array:
    """A promise to the compiler, which checks nothing: block starts are multiples of 16 (see `BlockIndex.start`)."""
    return pl.multiple_of(start, 16)
