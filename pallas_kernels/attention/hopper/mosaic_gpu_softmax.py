"""The softmax of the Hopper kernel: masks of partial tiles, steps with a running or a fixed maximum, normalisation."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.hopper.gpu_config import WARPGROUP_ROWS
from pallas_kernels.attention.hopper.kernel_refs import KernelShape, Refs, Row
from pallas_kernels.hopper import columns
from pallas_kernels.notation import INITIAL_ROW_MAX, MASKED_SCORE, Array, Scalar

MAX_SAFE_SUM = 2.0**80
"""A sum of weights up to which a fixed maximum is safe: values up to 2**47 cannot overflow the accumulator, as float32
ends at 2**128. Synthetic heads stay below 22 of these 55 nats (docs/log.md of 2026-11-25)."""


class Softmax(NamedTuple):
    """Weights of the latest tile, whose PV is not yet issued, and the maximum and sum of each row so far."""

    weights: Array
    row_max: Array
    row_sum: Array

    def with_weights_as(self, dtype: jax.typing.DTypeLike) -> "Softmax":
        """The same, the weights rounded to the type that the tensor cores multiply."""
        return self._replace(weights=self.weights.astype(dtype))


def empty_rows() -> tuple[Array, Array]:
    """Maximum and sum of rows that have seen no key."""
    layout = plgpu.Layout.WGMMA.reduce(1)  # a value per row, held by the threads that hold the row in an accumulator
    row_max, row_sum = (
        plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), x, jnp.float32), layout) for x in (INITIAL_ROW_MAX, 0.0)
    )
    return row_max, row_sum


# Masks.


def is_partial_tile(shape: KernelShape, row: Row, j: Scalar) -> Array:
    """Whether tile `j` of a q tile holds pairs that are not attended."""
    return (row.num_tiles > 0) & (j >= row.num_full * shape.tiles_per_block)


def _limits(refs: Refs, shape: KernelShape, row: Row, j: Scalar) -> tuple[Array, Array]:
    """The distance interval of tile `j`; nothing for a q tile that visits nothing."""
    entry = row.first + j // shape.tiles_per_block
    interval = jnp.clip(refs.interval[row.head, entry], 0, shape.num_intervals - 1)
    low = jnp.maximum(refs.intervals[row.head, interval, 0], 0)  # and so kv_pos <= q_pos
    high = jnp.where(row.count > 0, refs.intervals[row.head, interval, 1], 0)
    return low, high


def mask_tile(
    refs: Refs, shape: KernelShape, warpgroup: Array, row: Row, j: Scalar, slot: Scalar
) -> Callable[[Array], Array]:
    """The function that masks scores where positions of a partial tile, already in shared memory, forbid a pair."""

    def mask(s_qk: Array) -> Array:
        # Read here, where the mask is needed, and not ahead of the branch around it (579 against 568 TFLOP/s, together
        # with a later wait for V: docs/log.md of 2026-11-22, 5).
        low, high = _limits(refs, shape, row, j)
        rows = pl.ds(pl.multiple_of(row.q_start + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
        layout = plgpu.Layout.WGMMA
        # There is no vectorised load of one value per row or column of an accumulator: `optimized=False` says so.
        q_pos = plgpu.load(refs.q_pos.at[row.head, rows], layout=layout.reduce(1), optimized=False)
        kv_pos = plgpu.load(refs.smem["ints"].at[slot], layout=layout.reduce(0), optimized=False)
        plgpu.commit_smem()  # our reads of the positions come before the copy that overwrites them
        distance = columns(q_pos, s_qk.shape) - lax.broadcast_in_dim(kv_pos, s_qk.shape, [1])
        # Masked before the scale: a finite score, far enough below `INITIAL_ROW_MAX` that its weight is 0 after it.
        # With -inf a row without a key would subtract -inf from -inf, which is NaN.
        return jnp.where((distance >= low) & (distance < high), s_qk, MASKED_SCORE)

    return mask


# One tile's step. Exponentials are of base 2, the factor log2(e) being in `score_scale`: ex2.approx is one instruction
# of the multi-function unit, and a natural exponential is that and a product.


def online_step(shape: KernelShape, s_qk: Array, row_max: Array, row_sum: Array) -> tuple[Softmax, Array | None]:
    """One step of the online softmax: the state with float32 weights, and the factor on what came before."""
    # The scale is positive, so the maximum is taken first and scaled once a row; scale and subtraction are then one
    # multiply-add a score, in front of the exponential.
    new_max = jnp.maximum(row_max, jnp.max(s_qk, axis=1) * shape.score_scale)
    weights = jnp.exp2(s_qk * shape.score_scale - columns(new_max, s_qk.shape))
    # At every step: rescaling only when the maximum grows enough was not tried (docs/log.md of 2026-11-22). Full tiles
    # go without a factor altogether, see `fixed_max_step`.
    rescale = jnp.exp2(row_max - new_max)
    return Softmax(weights, new_max, row_sum * rescale + jnp.sum(weights, axis=1)), rescale


def fixed_max_step(shape: KernelShape, s_qk: Array, row_max: Array, row_sum: Array) -> tuple[Softmax, Array | None]:
    """One step of the softmax with a fixed maximum: the state with float32 weights, and no factor.

    A third of the instructions of `online_step` fall away: 633 against 600 TFLOP/s at 32 blocks per row (H100,
    docs/log.md of 2026-11-25).
    """
    weights = jnp.exp2(s_qk * shape.score_scale - columns(row_max, s_qk.shape))
    return Softmax(weights, row_max, row_sum + jnp.sum(weights, axis=1)), None


def flag_overflow(shape: KernelShape, softmax: Softmax) -> Softmax:
    """The state after the full tiles, its sum infinite where it has outgrown what is safe with a fixed maximum.

    A partial tile with a higher maximum may scale the sum down again, but not an accumulator that has overflowed.
    """
    weights, row_max, row_sum = softmax
    return Softmax(
        weights, row_max, jnp.where(row_sum <= MAX_SAFE_SUM, row_sum, jnp.inf) if shape.fixed_max else row_sum
    )


def normalised(shape: KernelShape, acc: Array, softmax: Softmax) -> tuple[Array, Array]:
    """Output and log-sum-exp; rows that attended nothing: zeros, -inf."""
    _, row_max, row_sum = softmax
    has_keys = row_sum > 0
    factor = jnp.where(has_keys, 1.0 / jnp.where(has_keys, row_sum, 1.0), 0.0)
    out = jnp.where(columns(has_keys, acc.shape), acc * columns(factor, acc.shape), 0.0)  # 0 * NaN is NaN
    # From base 2, of the kernel, to nats, of the contract.
    lse = jnp.where(has_keys, row_max * math.log(2.0) + jnp.log(row_sum), -jnp.inf)
    if shape.fixed_max:
        lse = jnp.where(row_sum <= MAX_SAFE_SUM, lse, jnp.inf)  # a NaN is computed again as well
    return out, lse
