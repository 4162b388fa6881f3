"""The body of the Hopper kernel: one producer warpgroup loads, two consumer warpgroups compute 64 query rows each.

A thread block is persistent: it walks the q tiles that the work table assigns to it. For tile `j` of a q tile's list a
consumer warpgroup holds the weights of tile `j - 1` and runs

    tensor cores    QK(j)        PV(j-1)
    this warpgroup         softmax(j) .....  rescale

so that the softmax of one tile hides behind the PV of the one before (Shah et al. 2024, "FlashAttention-3", section
3.2), while the other warpgroup uses the tensor cores (section 3.1). The QK that runs with the last PV of a q tile is
the first of the next q tile. The stages, in order:

| stage | function | waits for a tile at |
|---|---|---|
| load q, K, V, positions | `mosaic_gpu_producer.load` | `*_free` barriers |
| read the q tile's table row | `_read_row` | `q_ready` |
| QK and softmax of the first tile | `_first_tile` | `k_ready`, `pos_ready` |
| QK and softmax of tile j, PV of tile j - 1 | `_next_tile`, by `_middle_tiles` | `k_ready`, `pos_ready`, `v_ready` |
| last PV (and the next q tile's first QK) | `_finish_overlapped` or `_finish_alone` | `v_ready` |
| normalise, write out and lse | `_store` | |

Weights are `exp2(score - row_max)`, and any `row_max` gives the same result as long as nothing overflows: float32 and
bfloat16 hold exponents to 2**127. So full tiles keep the maximum of the q tile's first tile: no maximum, no rescaling.
A row whose weights sum to more than `MAX_SAFE_SUM` is flagged by a log-sum-exp of +inf, and a second launch over such
q tiles alone, an online softmax throughout, overwrites them (`KernelShape.fixed_max`).
"""

import functools
from collections.abc import Callable

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
    Row,
    tiles_of,
)
from pallas_kernels.attention.hopper.mosaic_gpu_producer import load
from pallas_kernels.attention.hopper.mosaic_gpu_softmax import (
    Softmax,
    empty_rows,
    fixed_max_step,
    flag_overflow,
    is_partial_tile,
    mask_tile,
    normalised,
    online_step,
)
from pallas_kernels.hopper import columns
from pallas_kernels.notation import Array, Ref, Scalar

CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
"""Registers of a thread. setmaxnreg takes multiples of 8 from 24 to 256 (PTX ISA, "setmaxnreg"), and a multiprocessor
has 65,536: 2 * 128 * 240 + 128 * 24 = 64,512."""


def attention_kernel(refs: Refs, shape: KernelShape) -> None:
    """Runs one thread block: see the module's first lines."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _consumer_warpgroups():
        # Registers change hands by whole warpgroups: a producer that only issues copies needs few.
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        _compute(refs, shape, warpgroup)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _producer_warpgroup():
        # What it releases goes to the pool from which the others' increase waits to be served (PTX ISA, "setmaxnreg").
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        load(refs, shape)


def _compute(refs: Refs, shape: KernelShape, warpgroup: Array) -> None:
    """Computes 64 rows of every q tile."""
    _ping_pong_start(refs, shape, warpgroup)
    row = _read_row(refs, shape, jnp.int32(0))
    softmax = _first_tile(refs, shape, warpgroup, row)

    def q_tile(carry: tuple[Array, Array, Scalar, Softmax]):
        n, tile, _, softmax = carry
        slot = n % shape.config.num_q_buffers
        row = _row(refs, shape, slot)
        # An accumulator lives in registers, in the layout that wgmma writes.
        acc = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, refs.q.shape[-1]), jnp.float32), plgpu.Layout.WGMMA)
        acc, softmax = _middle_tiles(refs, shape, warpgroup, row, n, tile, acc, softmax)
        tile += row.num_tiles
        finish = _finish_overlapped if shape.config.num_q_buffers == 2 else _finish_alone
        # With one q buffer the next q tile can only arrive once this one's output has left through the buffer.
        next_row, next_softmax = finish(refs, shape, warpgroup, row, n, tile, acc, softmax)
        return n + 1, tile, next_row.num_tiles, next_softmax

    zero = jnp.int32(0)
    lax.while_loop(lambda carry: carry[2] > 0, q_tile, (zero, zero, row.num_tiles, softmax))
    _end(refs, shape, warpgroup)


# Stage: the q tile's row of the work table.


def _read_row(refs: Refs, shape: KernelShape, n: Array) -> Row:
    """Waits for the n-th q tile of this thread block."""
    slot = n % shape.config.num_q_buffers
    plgpu.barrier_wait(refs.barriers["q_ready"].at[slot])
    return _row(refs, shape, slot)


def _row(refs: Refs, shape: KernelShape, slot: Array) -> Row:
    ints, offset = refs.smem["ints"], slot * ROW_FIELDS
    head, q_start, first, num_full, count = (
        ints[shape.config.num_k_stages, offset + c] for c in (HEAD, Q_START, FIRST, NUM_FULL, COUNT)
    )
    num_tiles = tiles_of(shape, count)
    return Row(head=head, q_start=q_start, first=first, num_full=num_full, count=count, num_tiles=num_tiles)


# Stage: the first tile of a q tile.


def _first_tile(refs: Refs, shape: KernelShape, warpgroup: Array, row: Row, n: Scalar = 0, tile: Scalar = 0) -> Softmax:
    """QK and softmax of a q tile's first tile, with nothing to overlap."""
    slot = tile % shape.config.num_k_stages
    is_real = row.num_tiles > 0
    is_partial = is_partial_tile(shape, row, 0)
    pl.when(is_real)(lambda: plgpu.barrier_wait(refs.barriers["k_ready"].at[slot]))
    pl.when(is_partial)(lambda: plgpu.barrier_wait(refs.barriers["pos_ready"].at[slot]))

    def scores(s_acc: Ref) -> Array:
        _ping_pong_wait(refs, shape, warpgroup)
        q_tile = refs.smem["q"].at[n % shape.config.num_q_buffers, warpgroup]
        # Rows of q and of K lie along the head dim, the axis that is summed over: both sides are K-major, wgmma's
        # natural order, and the transposition of the reference moves nothing.
        plgpu.wgmma(s_acc, q_tile, refs.smem["k"].at[slot].transpose((1, 0)))
        _ping_pong_arrive(refs, shape, warpgroup)
        return s_acc[...]  # waits for the wgmma

    s_qk = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, shape.config.tile_kv), jnp.float32))
    # No wgmma runs here, so a branch costs nothing but itself.
    s_qk = lax.cond(is_partial, mask_tile(refs, shape, warpgroup, row, 0, slot), lambda s_qk: s_qk, s_qk)
    # After the mask: the slot of K holds the tile's positions as well, and one barrier gives both back.
    pl.when(is_real)(lambda: plgpu.barrier_arrive(refs.barriers["k_free"].at[slot]))
    softmax, _ = online_step(shape, s_qk, *empty_rows())
    return softmax.with_weights_as(refs.q.dtype)


# Stage: QK and softmax of a tile with PV of the tile before.


def _middle_tiles(
    refs: Refs, shape: KernelShape, warpgroup: Array, row: Row, n: Array, tile: Array, acc: Array, softmax: Softmax
) -> tuple[Array, Softmax]:
    """All tiles of a q tile but the first: full ones, then partial ones."""
    slot = n % shape.config.num_q_buffers

    def step(j: Array, state: tuple[Array, Softmax], is_partial: bool):
        acc, softmax = state
        acc, softmax, rescale = _next_tile(
            refs, shape, warpgroup, row, slot, j, tile + j, acc, softmax, is_partial=is_partial
        )
        if shape.config.num_q_buffers == 2:  # the last output has had a tile's time to leave
            pl.when((j == 1) & (n > 0))(lambda: _free_q(refs, n - 1))
        return acc if rescale is None else acc * columns(rescale, acc.shape), softmax

    # Two loops, as no branch may stand between the issue of a wgmma and its end: ptxas waits for all of them there
    # (598 against 578 TFLOP/s, docs/log.md of 2026-11-22).
    # The first tile is done before either loop, full or partial.
    first_partial = jnp.maximum(row.num_full * shape.tiles_per_block, 1)
    acc, softmax = lax.fori_loop(1, first_partial, functools.partial(step, is_partial=False), (acc, softmax))
    state = acc, flag_overflow(shape, softmax)
    return lax.fori_loop(first_partial, row.num_tiles, functools.partial(step, is_partial=True), state)


def _next_tile(
    refs: Refs,
    shape: KernelShape,
    warpgroup: Array,
    row: Row,
    q_slot: Array,
    j: Scalar,
    tile: Array,
    acc: Array,
    softmax: Softmax,
    is_partial: bool | Array | None,
    is_first: bool = False,
) -> tuple[Array, Softmax, Array | None]:
    """QK and softmax of tile `j` of `row`, overlapped with PV of the tile before it, which may end another q tile.

    `is_partial` is None where a q tile's first tile may be partial or, at the end of the table, absent.
    Returns the accumulator with that PV, the softmax state with tile `j`, and the factor the accumulator still needs,
    None for a factor of 1.
    """
    weights = softmax.weights
    # QK reads the K of this tile and PV the V of the tile before it: two rings of slots.
    k_slot, v_slot = tile % shape.config.num_k_stages, (tile - 1) % shape.config.num_v_stages
    v = refs.smem["v"].at[v_slot]
    k_ready, k_free, pos_ready = (refs.barriers[name].at[k_slot] for name in ("k_ready", "k_free", "pos_ready"))
    if is_partial is None:
        is_real, is_partial = row.num_tiles > 0, is_partial_tile(shape, row, j)
        mask = lambda s_qk: lax.cond(is_partial, masked, lambda s_qk: s_qk, s_qk)  # noqa: E731
    else:
        is_real = True
        mask = (lambda s_qk: masked(s_qk)) if is_partial else (lambda s_qk: s_qk)
    # A masked tile may hold the first keys that a row attends: only a tile without masks keeps the first maximum.
    update = fixed_max_step if shape.fixed_max and is_partial is False and not is_first else online_step
    _when(is_real, lambda: plgpu.barrier_wait(k_ready))
    _when(is_partial, lambda: plgpu.barrier_wait(pos_ready))
    masked = mask_tile(refs, shape, warpgroup, row, j, k_slot)

    def run(s_acc: Ref, o_acc: Ref):
        _seed(shape, o_acc, acc)
        _ping_pong_wait(refs, shape, warpgroup)
        plgpu.wgmma(s_acc, refs.smem["q"].at[q_slot, warpgroup], refs.smem["k"].at[k_slot].transpose((1, 0)))
        # V is awaited once QK is under way (docs/log.md of 2026-11-22, 5).
        plgpu.barrier_wait(refs.barriers["v_ready"].at[v_slot])
        _issue_pv(shape, o_acc, weights, v)
        _ping_pong_arrive(refs, shape, warpgroup)
        # Products of one warpgroup end in the order of their issue: with one of two left, QK is done and PV runs.
        s_qk = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
        s_qk = mask(s_qk)
        _when(is_real, lambda: plgpu.barrier_arrive(k_free))
        # The softmax comes before the end of PV, and its weights stay in float32: PV still reads the registers of the
        # 16-bit ones, and ptxas serialises every wgmma whose input registers are written while it runs (its C7513).
        state = lax.optimization_barrier(update(shape, s_qk, softmax.row_max, softmax.row_sum))
        out = _drain(shape, o_acc, acc, weights, v, wait_n=0)
        plgpu.barrier_arrive(refs.barriers["v_free"].at[v_slot])
        return out, state

    rows, num_keys = WARPGROUP_ROWS, shape.config.tile_kv
    accumulators = (
        plgpu.WGMMAAccumulatorRef((rows, num_keys), jnp.float32),
        plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, acc.shape[1]), jnp.float32),
    )
    acc, (new_softmax, rescale) = pl.run_scoped(run, *accumulators)
    return acc, new_softmax.with_weights_as(weights.dtype), rescale


# Stage: the end of a q tile.


def _last_tile(refs: Refs, shape: KernelShape, warpgroup: Array, tile: Array, acc: Array, weights: Array) -> Array:
    """PV of a q tile's last tile, with nothing to overlap."""
    slot = (tile - 1) % shape.config.num_v_stages
    v = refs.smem["v"].at[slot]
    plgpu.barrier_wait(refs.barriers["v_ready"].at[slot])

    def run(o_acc: Ref) -> Array:
        _seed(shape, o_acc, acc)
        _ping_pong_wait(refs, shape, warpgroup)
        _issue_pv(shape, o_acc, weights, v)
        _ping_pong_arrive(refs, shape, warpgroup)
        return _drain(shape, o_acc, acc, weights, v, wait_n=0)

    acc = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, acc.shape[1]), jnp.float32))
    plgpu.barrier_arrive(refs.barriers["v_free"].at[slot])
    return acc


def _finish_overlapped(
    refs: Refs, shape: KernelShape, warpgroup: Array, row: Row, n: Array, tile: Array, acc: Array, softmax: Softmax
) -> tuple[Row, Softmax]:
    """The last PV with the first QK of the next q tile, then the output: that q tile's row and softmax state."""
    pl.when((row.num_tiles == 1) & (n > 0))(lambda: _free_q(refs, n - 1))  # no second tile has done it
    next_row = _read_row(refs, shape, n + 1)
    fresh = Softmax(softmax.weights, *empty_rows())

    def first_of_next(is_partial: bool | None) -> Callable[[Array], tuple[Array, Softmax]]:
        return lambda acc: _next_tile(
            refs, shape, warpgroup, next_row, (n + 1) % 2, 0, tile, acc, fresh, is_partial, is_first=True
        )[:2]

    # Nearly always a full tile. The branch stands around the whole step, not between the issue of a wgmma and its end:
    # 643 against 618 TFLOP/s at 32 blocks per row (H200, docs/log.md of 2026-11-26).
    acc, next_softmax = lax.cond(next_row.num_full > 0, first_of_next(False), first_of_next(None), acc)
    _store(refs, shape, refs.smem["q"].at[n % 2, warpgroup], warpgroup, row, acc, softmax)
    return next_row, next_softmax


def _finish_alone(
    refs: Refs, shape: KernelShape, warpgroup: Array, row: Row, n: Array, tile: Array, acc: Array, softmax: Softmax
) -> tuple[Row, Softmax]:
    """The last PV, the output through q's buffer, then the first QK of the next q tile: its row and softmax state."""
    acc = _last_tile(refs, shape, warpgroup, tile, acc, softmax.weights)
    _store(refs, shape, refs.smem["q"].at[0, warpgroup], warpgroup, row, acc, softmax)
    _free_q(refs, n)
    next_row = _read_row(refs, shape, n + 1)
    return next_row, _first_tile(refs, shape, warpgroup, next_row, n + 1, tile)


def _store(
    refs: Refs, shape: KernelShape, buffer: Ref, warpgroup: Array, row: Row, acc: Array, softmax: Softmax
) -> None:
    """Normalises and writes 64 rows of the output and of the log-sum-exp."""
    out, lse = normalised(shape, acc, softmax)
    rows = pl.ds(pl.multiple_of(row.q_start + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
    # TMA stores from shared memory alone: the output takes the place of the q tile, which is not read again.
    buffer[...] = out.astype(buffer.dtype)
    # 64 floats go from registers to device memory: not worth a buffer and a copy.
    refs.lse[row.head, rows] = lse
    plgpu.commit_smem()  # TMA sees what threads wrote only past a proxy fence (PTX ISA, "fence.proxy.async")
    plgpu.copy_smem_to_gmem(buffer, refs.out.at[row.head, rows])


def _free_q(refs: Refs, n: Array) -> None:
    """Gives the buffer of the n-th q tile back once its output has left."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # read, not yet written out: the buffer is free all the same
    plgpu.commit_smem()  # our reads of the row come before the copy that overwrites it
    plgpu.barrier_arrive(refs.barriers["q_free"].at[n % refs.smem["q"].shape[0]])


def _when(condition: bool | Array, effect: Callable[[], None]) -> None:
    """Runs `effect` if a condition, known when traced or on the device only, holds."""
    if isinstance(condition, bool):
        if condition:
            effect()
        return
    pl.when(condition)(effect)


# The product with V: an accumulator that starts from a value and a left side in registers. GPU interpret mode of
# JAX 0.11 has neither, so each step has a twin for it.


def _seed(shape: KernelShape, accumulator: Ref, acc: Array) -> None:
    if not shape.interpretable:
        # wgmma adds to its accumulator, so the sum so far is where it starts: no product is added afterwards.
        accumulator[...] = acc


def _issue_pv(shape: KernelShape, accumulator: Ref, weights: Array, v: Ref) -> None:
    if not shape.interpretable:
        # The left side may come from registers, and scores that are rounded to 16 bits lie there as their accumulator
        # did (PTX ISA, "Register Fragments"): weights never go to shared memory. The right side may not. V's rows lie
        # along the head dim, N, and not along the keys that are summed over: the transposed order, which wgmma reads of
        # 16-bit types alone.
        plgpu.wgmma(accumulator, weights, v)


def _drain(shape: KernelShape, accumulator: Ref, acc: Array, weights: Array, v: Ref, *, wait_n: int) -> Array:
    if shape.interpretable:
        value = acc + jnp.dot(weights, v[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # a generic read, which the tensor cores would not do
        return value
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=wait_n)


# Ping-pong: warpgroup 0 issues to the tensor cores, then 1, then 0 again, by mbarriers of one arrival where
# FlashAttention-3 has named barriers. At a head dim of 128 they drift into alternation by themselves, and the barrier
# made each wait for the other's issue (598 against 620 TFLOP/s, docs/log.md of 2026-11-22, 7); at 64 gpu_tuned.json has
# it on.


def _ping_pong_wait(refs: Refs, shape: KernelShape, warpgroup: Array) -> None:
    if shape.config.ping_pong:
        plgpu.barrier_wait(refs.barriers["ping_pong"].at[warpgroup])


def _ping_pong_arrive(refs: Refs, shape: KernelShape, warpgroup: Array) -> None:
    if shape.config.ping_pong:
        plgpu.barrier_arrive(refs.barriers["ping_pong"].at[1 - warpgroup])


def _ping_pong_start(refs: Refs, shape: KernelShape, warpgroup: Array) -> None:
    # No warpgroup has arrived for the first turn: warpgroup 1 opens the barrier of warpgroup 0.
    pl.when(warpgroup == 1)(lambda: _ping_pong_arrive(refs, shape, warpgroup))


def _end(refs: Refs, shape: KernelShape, warpgroup: Array) -> None:
    """Takes the last arrival, so that no barrier is left half observed, and waits until the last output is written."""
    pl.when(warpgroup == 0)(lambda: _ping_pong_wait(refs, shape, warpgroup))
    plgpu.wait_smem_to_gmem(0)
