"""The body of the Hopper kernel: one warpgroup loads, two compute 64 query rows each, blocks stay for many q tiles.

A thread block walks q tiles `program, program + num_programs, ...` of the work table. For tile `j` of a q tile's list a
computing warpgroup holds the weights of tile `j - 1` and runs

    tensor cores    QK(j)        PV(j-1)
    this warpgroup         softmax(j) .....  rescale

so that the softmax of one tile hides behind the PV of the one before (Shah et al. 2024, "FlashAttention-3", section
3.2), while the other warpgroup takes its turn at the tensor cores (section 3.1). The QK that runs beside the last PV of
a q tile is the first of the next q tile.

Weights are `exp2(score - top)`, and any `top` gives the same result as long as nothing overflows: float32 and bfloat16
hold exponents to 2**127. So full tiles keep the maximum of the q tile's first tile: no maximum, no rescaling. A row
whose weights sum to more than `LARGEST_TOTAL` says so by a log-sum-exp of +inf, and a second launch over such q tiles
alone, with a running maximum everywhere, writes them again (`KernelShape.fixes_top`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.hopper.gpu_config import COMPUTE_WARPGROUPS, ROW_FIELDS, WARPGROUP_ROWS
from pallas_kernels.attention.hopper.kernel_refs import (
    COUNT,
    FIRST,
    HEAD,
    NUM_FULL,
    Q_START,
    KernelShape,
    Refs,
    tiles_of,
)
from pallas_kernels.attention.hopper.mosaic_gpu_producer import load
from pallas_kernels.notation import INITIAL_ROW_MAX, MASKED_SCORE

LARGEST_TOTAL = 2.0**80
"""A sum of weights up to which a fixed maximum is trusted: values up to 2**47 cannot overflow the accumulator."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One q tile of the work table, as scalars."""

    head: Any
    q_start: Any
    first: Any
    num_full: Any
    count: Any
    num_tiles: Any


def attention_kernel(refs: Refs, shape: KernelShape):
    """Runs one thread block: see the module's first lines."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute_warpgroups():
        plgpu.set_max_registers(240, action="increase")
        _compute(refs, shape, warpgroup)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _loading_warpgroup():
        plgpu.set_max_registers(24, action="decrease")
        load(refs, shape)


def _compute(refs: Refs, shape: KernelShape, warpgroup):
    """Computes 64 rows of every q tile."""
    _end_turn_before_the_first(refs, shape, warpgroup)
    row = _read_row(refs, shape, jnp.int32(0))
    softmax = _first_tile(refs, shape, warpgroup, row)

    def q_tile(carry):
        n, tile, _, softmax = carry
        slot = n % shape.config.num_q_buffers
        row = _row(refs, shape, slot)
        acc = _splat(jnp.zeros((WARPGROUP_ROWS, refs.q.shape[-1]), jnp.float32), plgpu.Layout.WGMMA)
        acc, softmax = _middle_tiles(refs, shape, warpgroup, row, n, tile, acc, softmax)
        tile += row.num_tiles
        finish = _finish_overlapped if shape.config.num_q_buffers == 2 else _finish_alone
        next_row, next_softmax = finish(refs, shape, warpgroup, row, n, tile, acc, softmax)
        return n + 1, tile, next_row.num_tiles, next_softmax

    zero = jnp.int32(0)
    lax.while_loop(lambda carry: carry[2] > 0, q_tile, (zero, zero, row.num_tiles, softmax))
    _end(refs, shape, warpgroup)


def _middle_tiles(refs: Refs, shape: KernelShape, warpgroup, row: Row, n, tile, acc, softmax):
    """All tiles of a q tile but the first: full ones, then partial ones.

    Two loops, and no branch between the issue of a wgmma and its end: at a branch the compiler waits for all of them.
    """
    slot = n % shape.config.num_q_buffers

    def step(j, state, is_partial):
        acc, softmax = state
        acc, softmax, decay = _next_tile(
            refs, shape, warpgroup, row, slot, j, tile + j, acc, softmax, is_partial=is_partial
        )
        if shape.config.num_q_buffers == 2:  # the last output has had a tile's time to leave
            pl.when((j == 1) & (n > 0))(lambda: _free_q(refs, n - 1))
        return acc if decay is None else acc * _columns(decay, acc.shape), softmax

    first_partial = jnp.maximum(row.num_full * shape.tiles_per_block, 1)
    acc, softmax = lax.fori_loop(1, first_partial, functools.partial(step, is_partial=False), (acc, softmax))
    state = acc, _distrust(shape, softmax)
    return lax.fori_loop(first_partial, row.num_tiles, functools.partial(step, is_partial=True), state)


def _read_row(refs: Refs, shape: KernelShape, n) -> Row:
    """Waits for the n-th q tile of this thread block."""
    slot = n % shape.config.num_q_buffers
    plgpu.barrier_wait(refs.barriers["q_ready"].at[slot])
    return _row(refs, shape, slot)


def _row(refs: Refs, shape: KernelShape, slot) -> Row:
    ints, offset = refs.smem["ints"], slot * ROW_FIELDS
    head, q_start, first, num_full, count = (
        ints[shape.config.num_k_stages, offset + c] for c in (HEAD, Q_START, FIRST, NUM_FULL, COUNT)
    )
    num_tiles = tiles_of(shape, count)
    return Row(head=head, q_start=q_start, first=first, num_full=num_full, count=count, num_tiles=num_tiles)


def _empty_softmax():
    """Running maximum and running sum of rows that have seen no key."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    return tuple(_splat(jnp.full((WARPGROUP_ROWS,), x, jnp.float32), layout) for x in (INITIAL_ROW_MAX, 0.0))


def _first_tile(refs: Refs, shape: KernelShape, warpgroup, row: Row, n=0, tile=0):
    """QK and softmax of a q tile's first tile, with nothing to overlap: weights, maximum and sum."""
    slot = tile % shape.config.num_k_stages
    is_real = row.num_tiles > 0
    is_partial = _is_partial(shape, row, 0)
    pl.when(is_real)(lambda: plgpu.barrier_wait(refs.barriers["k_ready"].at[slot]))
    pl.when(is_partial)(lambda: plgpu.barrier_wait(refs.barriers["pos_ready"].at[slot]))

    def scores(s_acc):
        _wait_turn(refs, shape, warpgroup)
        q_tile = refs.smem["q"].at[n % shape.config.num_q_buffers, warpgroup]
        plgpu.wgmma(s_acc, q_tile, refs.smem["k"].at[slot].transpose((1, 0)))
        _end_turn(refs, shape, warpgroup)
        return s_acc[...]

    s_qk = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, shape.config.tile_kv), jnp.float32))
    s_qk = lax.cond(is_partial, _mask(refs, shape, warpgroup, row, 0, slot), lambda s_qk: s_qk, s_qk)
    pl.when(is_real)(lambda: plgpu.barrier_arrive(refs.barriers["k_free"].at[slot]))
    weights, top, total, _ = _softmax(shape, s_qk, *_empty_softmax())
    return weights.astype(refs.q.dtype), top, total


def _next_tile(
    refs: Refs, shape: KernelShape, warpgroup, row: Row, q_slot, j, tile, acc, softmax, is_partial, is_first=False
):
    """QK and softmax of tile `j` of `row`, beside PV of the tile before it, which may end another q tile.

    `is_partial` is None where a q tile's first tile may be partial or, at the end of the table, absent.
    Returns the accumulator with that PV, the softmax state with tile `j`, and the factor the accumulator still needs,
    None for a factor of 1.
    """
    weights, top, total = softmax
    k_slot, v_slot = tile % shape.config.num_k_stages, (tile - 1) % shape.config.num_v_stages
    v = refs.smem["v"].at[v_slot]
    k_ready, k_free, pos_ready = (refs.barriers[name].at[k_slot] for name in ("k_ready", "k_free", "pos_ready"))
    if is_partial is None:
        is_real, is_partial = row.num_tiles > 0, _is_partial(shape, row, j)
        mask = lambda s_qk: lax.cond(is_partial, mask_tile, lambda s_qk: s_qk, s_qk)  # noqa: E731
    else:
        is_real = True
        mask = (lambda s_qk: mask_tile(s_qk)) if is_partial else (lambda s_qk: s_qk)
    update = _softmax_below if shape.fixes_top and is_partial is False and not is_first else _softmax
    _when(is_real, lambda: plgpu.barrier_wait(k_ready))
    _when(is_partial, lambda: plgpu.barrier_wait(pos_ready))
    mask_tile = _mask(refs, shape, warpgroup, row, j, k_slot)

    def run(s_acc, o_acc):
        _seed(shape, o_acc, acc)
        _wait_turn(refs, shape, warpgroup)
        plgpu.wgmma(s_acc, refs.smem["q"].at[q_slot, warpgroup], refs.smem["k"].at[k_slot].transpose((1, 0)))
        plgpu.barrier_wait(refs.barriers["v_ready"].at[v_slot])
        _issue_pv(shape, o_acc, weights, v)
        _end_turn(refs, shape, warpgroup)
        s_qk = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
        s_qk = mask(s_qk)
        _when(is_real, lambda: plgpu.barrier_arrive(k_free))
        # Before PV ends, and left in float32: PV still reads the registers of the 16-bit weights.
        state = lax.optimization_barrier(update(shape, s_qk, top, total))
        out = _drain(shape, o_acc, acc, weights, v, wait_n=0)
        plgpu.barrier_arrive(refs.barriers["v_free"].at[v_slot])
        return out, state

    rows, columns = WARPGROUP_ROWS, shape.config.tile_kv
    accumulators = (
        plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32),
        plgpu.WGMMAAccumulatorRef(acc.shape, jnp.float32),
    )
    acc, (new_weights, top, total, decay) = pl.run_scoped(run, *accumulators)
    return acc, (new_weights.astype(weights.dtype), top, total), decay


def _last_tile(refs: Refs, shape: KernelShape, warpgroup, tile, acc, weights):
    """PV of a q tile's last tile, with nothing to overlap."""
    slot = (tile - 1) % shape.config.num_v_stages
    v = refs.smem["v"].at[slot]
    plgpu.barrier_wait(refs.barriers["v_ready"].at[slot])

    def run(o_acc):
        _seed(shape, o_acc, acc)
        _wait_turn(refs, shape, warpgroup)
        _issue_pv(shape, o_acc, weights, v)
        _end_turn(refs, shape, warpgroup)
        return _drain(shape, o_acc, acc, weights, v, wait_n=0)

    acc = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(acc.shape, jnp.float32))
    plgpu.barrier_arrive(refs.barriers["v_free"].at[slot])
    return acc


def _finish_overlapped(refs: Refs, shape: KernelShape, warpgroup, row: Row, n, tile, acc, softmax):
    """The last PV beside the first QK of the next q tile, then the output: that q tile's row and softmax state."""
    pl.when((row.num_tiles == 1) & (n > 0))(lambda: _free_q(refs, n - 1))  # no second tile has done it
    next_row = _read_row(refs, shape, n + 1)
    fresh = (softmax[0], *_empty_softmax())

    def first_of_next(is_partial):
        return lambda acc: _next_tile(
            refs, shape, warpgroup, next_row, (n + 1) % 2, 0, tile, acc, fresh, is_partial, is_first=True
        )[:2]

    # Nearly always a full tile: told apart before, not between the issue of a wgmma and its end.
    acc, next_softmax = lax.cond(next_row.num_full > 0, first_of_next(False), first_of_next(None), acc)
    _store(refs, shape, refs.smem["q"].at[n % 2, warpgroup], warpgroup, row, acc, *softmax[1:])
    return next_row, next_softmax


def _finish_alone(refs: Refs, shape: KernelShape, warpgroup, row: Row, n, tile, acc, softmax):
    """The last PV, the output through q's buffer, then the first QK of the next q tile: its row and softmax state."""
    acc = _last_tile(refs, shape, warpgroup, tile, acc, softmax[0])
    _store(refs, shape, refs.smem["q"].at[0, warpgroup], warpgroup, row, acc, *softmax[1:])
    _free_q(refs, n)
    next_row = _read_row(refs, shape, n + 1)
    return next_row, _first_tile(refs, shape, warpgroup, next_row, n + 1, tile)


def _free_q(refs: Refs, n):
    """Gives the buffer of the n-th q tile back once its output has left."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.commit_smem()  # our reads of the row come before the copy that overwrites it
    plgpu.barrier_arrive(refs.barriers["q_free"].at[n % refs.smem["q"].shape[0]])


def _store(refs: Refs, shape: KernelShape, buffer, warpgroup, row: Row, acc, top, total):
    """Normalises and writes 64 rows of the output and of the log-sum-exp; rows that attended nothing: zeros, -inf."""
    has_keys = total > 0
    factor = jnp.where(has_keys, 1.0 / jnp.where(has_keys, total, 1.0), 0.0)
    out = jnp.where(_columns(has_keys, acc.shape), acc * _columns(factor, acc.shape), 0.0)  # 0 * NaN is NaN
    lse = jnp.where(has_keys, top * math.log(2.0) + jnp.log(total), -jnp.inf)
    if shape.fixes_top:
        lse = jnp.where(total <= LARGEST_TOTAL, lse, jnp.inf)  # a NaN too is looked at again
    rows = pl.ds(pl.multiple_of(row.q_start + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
    buffer[...] = out.astype(buffer.dtype)
    refs.lse[row.head, rows] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, refs.out.at[row.head, rows])


# Scores.


def _limits(refs: Refs, shape: KernelShape, row: Row, j):
    """The distance interval of tile `j`; nothing for a q tile that visits nothing."""
    entry = row.first + j // shape.tiles_per_block
    interval = jnp.clip(refs.interval[row.head, entry], 0, shape.num_intervals - 1)
    low = jnp.maximum(refs.intervals[row.head, interval, 0], 0)  # and so kv_pos <= q_pos
    high = jnp.where(row.count > 0, refs.intervals[row.head, interval, 1], 0)
    return low, high


def _is_partial(shape: KernelShape, row: Row, j):
    return (row.num_tiles > 0) & (j >= row.num_full * shape.tiles_per_block)


def _mask(refs: Refs, shape: KernelShape, warpgroup, row: Row, j, slot):
    """The function that masks scores where positions of a partial tile, already in shared memory, forbid a pair."""

    def mask(s_qk):
        low, high = _limits(refs, shape, row, j)
        rows = pl.ds(pl.multiple_of(row.q_start + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
        layout = plgpu.Layout.WGMMA
        q_pos = plgpu.load(refs.q_pos.at[row.head, rows], layout=layout.reduce(1), optimized=False)
        kv_pos = plgpu.load(refs.smem["ints"].at[slot], layout=layout.reduce(0), optimized=False)
        plgpu.commit_smem()  # our reads of the positions come before the copy that overwrites them
        distance = _columns(q_pos, s_qk.shape) - lax.broadcast_in_dim(kv_pos, s_qk.shape, [1])
        return jnp.where((distance >= low) & (distance < high), s_qk, MASKED_SCORE)

    return mask


def _softmax(shape: KernelShape, s_qk, top, total):
    """One step of the online softmax: float32 weights, new maximum and sum, and the factor on what came before."""
    new_top = jnp.maximum(top, jnp.max(s_qk, axis=1) * shape.score_scale)
    weights = jnp.exp2(s_qk * shape.score_scale - _columns(new_top, s_qk.shape))
    decay = jnp.exp2(top - new_top)
    return weights, new_top, total * decay + jnp.sum(weights, axis=1), decay


def _softmax_below(shape: KernelShape, s_qk, top, total):
    """One step of the softmax below a maximum that stays: float32 weights, the maximum, the sum, and no factor."""
    weights = jnp.exp2(s_qk * shape.score_scale - _columns(top, s_qk.shape))
    return weights, top, total + jnp.sum(weights, axis=1), None


def _distrust(shape: KernelShape, softmax):
    """The softmax state after the full tiles, its sum infinite where that outgrew what a fixed maximum is trusted for.

    A partial tile with a higher maximum may scale the sum down again, but not an accumulator that has overflowed.
    """
    weights, top, total = softmax
    return weights, top, jnp.where(total <= LARGEST_TOTAL, total, jnp.inf) if shape.fixes_top else total


def _when(condition, effect):
    """Runs `effect` if a condition, known now or on the device, holds."""
    if isinstance(condition, bool):
        return effect() if condition else None
    return pl.when(condition)(effect)


def _columns(x, shape):
    """A value per row, repeated along the columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def _splat(x, layout):
    return plgpu.layout_cast(x, layout)


# The product with V: an accumulator that starts from a value and a left side in registers, and its twin for interpret
# mode, which has neither.


def _seed(shape: KernelShape, accumulator, acc):
    if not shape.interpretable:
        accumulator[...] = acc


def _issue_pv(shape: KernelShape, accumulator, weights, v):
    if not shape.interpretable:
        plgpu.wgmma(accumulator, weights, v)


def _drain(shape: KernelShape, accumulator, acc, weights, v, *, wait_n):
    if shape.interpretable:
        value = acc + jnp.dot(weights, v[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # a generic read, which the tensor cores would not do
        return value
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=wait_n)


# Turns: warpgroup 0 issues to the tensor cores, then 1, then 0 again.


def _wait_turn(refs: Refs, shape: KernelShape, warpgroup):
    if shape.config.take_turns:
        plgpu.barrier_wait(refs.barriers["turn"].at[warpgroup])


def _end_turn(refs: Refs, shape: KernelShape, warpgroup):
    if shape.config.take_turns:
        plgpu.barrier_arrive(refs.barriers["turn"].at[1 - warpgroup])


def _end_turn_before_the_first(refs: Refs, shape: KernelShape, warpgroup):
    pl.when(warpgroup == 1)(lambda: _end_turn(refs, shape, warpgroup))


def _end(refs: Refs, shape: KernelShape, warpgroup):
    """Takes the turn that nobody uses, and waits until the last output is written."""
    pl.when(warpgroup == 0)(lambda: _wait_turn(refs, shape, warpgroup))
    plgpu.wait_smem_to_gmem(0)
