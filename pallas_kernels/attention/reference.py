"""The meaning of block-sparse attention: a dense mask, a float32 softmax; slow and quadratic in memory."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.block_index import BlockIndex
from pallas_kernels.notation import AnyArray, Array, Float, Int32, Scalar


def pair_is_attended(q_pos: AnyArray, kv_pos: AnyArray, interval: AnyArray | tuple[Scalar, Scalar]) -> Any:
    """True where causality and the distance interval `(lo, hi)` let a query see a key; shape `[queries, keys]`."""
    distance = q_pos[:, None] - kv_pos[None, :]
    return (distance >= 0) & (distance >= interval[0]) & (distance < interval[1])


def coverage(index: BlockIndex, q_pos: Int32[Array, "h t"], kv_pos: Int32[Array, "n s"]) -> Int32[Array, "h t s"]:
    """How many times each (query, key) pair is attended; a sound plan never exceeds 1."""

    def q_block(
        first: Array,
        num_full: Array,
        count: Array,
        start: Array,
        interval: Array,
        intervals: Array,
        q_pos: Array,
        kv_pos: Array,
    ) -> Array:
        def visit(j: Array, counts: Array) -> Array:
            entry = first + j
            block = jax.lax.dynamic_slice_in_dim(kv_pos, start[entry], index.block_kv)
            tile = (j < num_full) | pair_is_attended(q_pos, block, intervals[interval[entry]])
            old = jax.lax.dynamic_slice_in_dim(counts, start[entry], index.block_kv, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(counts, old + tile, start[entry], axis=1)

        return jax.lax.fori_loop(0, count, visit, jnp.zeros((index.block_q, kv_pos.shape[0]), jnp.int32))

    def head(
        first: Array,
        num_full: Array,
        count: Array,
        start: Array,
        interval: Array,
        intervals: Array,
        pos_row: Array,
        q_pos: Array,
    ) -> Array:
        def row(first: Array, num_full: Array, count: Array, q_pos: Array, kv_pos: Array) -> Array:
            return q_block(first, num_full, count, start, interval, intervals, q_pos, kv_pos)

        counts = jax.vmap(row)(first, num_full, count, q_pos.reshape(-1, index.block_q), kv_pos[pos_row])
        return counts.reshape(-1, kv_pos.shape[1])

    index = jax.tree.map(jnp.asarray, index)
    lists: list[Any] = [index.first, index.num_full, index.count, index.start, index.interval, index.intervals]
    return jax.vmap(head)(lists[0], lists[1], lists[2], lists[3], lists[4], lists[5], jnp.asarray(index.pos_row), q_pos)


def attend(inputs: AttentionInputs) -> tuple[Float[Array, "h t d"], Float[Array, "h t"]]:
    """Attention output in the query's dtype and log-sum-exp of the scaled scores in float32.

    A query that attends nothing gives zeros and -inf.
    """
    mask = coverage(inputs.index, inputs.q_pos, inputs.kv_pos) > 0
    k_hsd, v_hsd = (x.astype(jnp.float32) for x in inputs.keys_and_values_per_head())
    scores = jnp.einsum("htd,hsd->hts", inputs.q.astype(jnp.float32), k_hsd, precision="highest") * inputs.scale
    scores = jnp.where(mask, scores, -jnp.inf)
    row_max = jnp.max(scores, axis=-1, keepdims=True)
    row_max = jnp.where(jnp.isfinite(row_max), row_max, 0.0)
    weights = jnp.where(mask, jnp.exp(scores - row_max), 0.0)
    row_sum = jnp.sum(weights, axis=-1, keepdims=True)
    v_hsd = jnp.where(jnp.any(mask, axis=1)[..., None], v_hsd, 0.0)  # 0 * NaN is NaN
    out = jnp.einsum("hts,hsd->htd", weights, v_hsd, precision="highest") / jnp.where(row_sum > 0, row_sum, 1.0)
    return out.astype(inputs.q.dtype), (row_max + jnp.log(row_sum))[..., 0]
