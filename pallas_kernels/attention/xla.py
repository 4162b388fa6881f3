"""Block-sparse attention in plain XLA: loops over visited blocks, never builds [t, s], differentiable, runs anywhere.

Forward and backward walk the same lists with an online softmax (Dao et al. 2022, "FlashAttention", Algorithms 1 and 4).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.attention.reference import pair_is_attended
from pallas_kernels.notation import MASKED_SCORE, PAD_KV_POS, Array, Float

type Attend = Callable[[AttentionInputs], tuple[Float[Array, "h t d"], Float[Array, "h t"]]]


def attend(inputs: AttentionInputs) -> tuple[Float[Array, "h t d"], Float[Array, "h t"]]:
    """Attention output in the query's dtype and log-sum-exp in float32; a query that attends nothing: zeros, -inf."""
    # Heads one after another: a step holds the scores of one block, whatever the number of heads.
    return jax.lax.map(lambda h: _head(inputs, h), jnp.arange(inputs.q.shape[0]))


def with_gradients(forward: Attend) -> Attend:
    """A backend's forward pass with gradients in q, k, v and the extra rows, recomputed here from its lse."""
    attend = jax.custom_vjp(forward)

    def forward_with_residuals(inputs: AttentionInputs):
        out, lse = forward(inputs)
        return (out, lse), (inputs, out, lse)

    attend.defvjp(forward_with_residuals, _backward)
    return attend


def _head_view(inputs: AttentionInputs, h: Array) -> tuple[Array, ...]:
    """The kv view of head `h`: k and v, `[s + x, d]`."""
    kv_head = h // inputs.heads_per_kv_head
    return tuple(
        jnp.concatenate([shared[kv_head], extra[h]]) if extra.shape[1] else shared[kv_head]
        for shared, extra in ((inputs.k, inputs.k_extra), (inputs.v, inputs.v_extra))
    )


def _visit(
    inputs: AttentionInputs, view: tuple[Array, ...], h: Array, i: Array, q_pos: Array, j: Array
) -> tuple[Array, Array, Array, Array]:
    """The `j`-th block of q block `i`: its first row, keys, values and mask [block_q, block_kv]."""
    index = inputs.index
    k_sd, v_sd = view
    entry = index.first[h, i] + j
    start = index.start[h, entry]
    # One dynamic slice a step: 0.13 to 0.27 s where gathers of 2, 4 or 8 blocks took 0.44, 0.32 and 0.59 (CPU, 8K
    # tokens, 8 heads, docs/log.md of 2026-11-22).
    block = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=index.block_kv)
    pos = block(inputs.kv_pos[index.pos_row[h, i]])
    interval = index.intervals[h, index.interval[h, entry]]
    mask = (j < index.num_full[h, i]) | pair_is_attended(q_pos, pos, interval)
    is_real = (pos != PAD_KV_POS)[:, None]  # 0 * NaN is NaN: what no query attends must not be multiplied
    return start, jnp.where(is_real, block(k_sd), 0), jnp.where(is_real, block(v_sd), 0), mask


def _head(inputs: AttentionInputs, h: Array) -> tuple[Float[Array, "t d"], Float[Array, " t"]]:
    """Output and log-sum-exp of head `h`."""
    index, dtype = inputs.index, inputs.q.dtype
    view = _head_view(inputs, h)

    def q_block(i: Array) -> tuple[Array, Array]:
        rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * index.block_q, slice_size=index.block_q)
        q_td = rows(inputs.q[h])
        q_pos = rows(inputs.q_pos[h])

        def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            acc, row_max, row_sum = carry
            _, k_sd, v_sd, mask = _visit(inputs, view, h, i, q_pos, j)
            scores = jnp.einsum("td,sd->ts", q_td, k_sd, preferred_element_type=jnp.float32)
            scores = jnp.where(mask, scores * inputs.scale, MASKED_SCORE)
            new_row_max = jnp.maximum(row_max, jnp.max(scores, axis=1))
            # Masked twice: in a row without a key so far the maximum is a masked score, whose weight would be exp(0).
            weights = jnp.where(mask, jnp.exp(scores - new_row_max[:, None]), 0.0)
            rescale = jnp.exp(row_max - new_row_max)
            # Weights in the inputs' type, sums in float32, as the tensor cores of the other backends have them.
            added = jnp.einsum("ts,sd->td", weights.astype(dtype), v_sd, preferred_element_type=jnp.float32)
            return acc * rescale[:, None] + added, new_row_max, row_sum * rescale + jnp.sum(weights, axis=1)

        empty = (jnp.zeros(q_td.shape), jnp.full(index.block_q, MASKED_SCORE), jnp.zeros(index.block_q))
        acc, row_max, row_sum = jax.lax.fori_loop(0, index.count[h, i], step, empty)
        # Rows that attended nothing: zeros over 1, and a log-sum-exp of -inf.
        row_sum = jnp.where(row_sum > 0, row_sum, 1.0)
        lse = jnp.where(row_max > MASKED_SCORE, row_max + jnp.log(row_sum), -jnp.inf)
        return (acc / row_sum[:, None]).astype(dtype), lse

    out, lse = jax.lax.map(q_block, jnp.arange(index.num_q_blocks))
    return out.reshape(inputs.q.shape[1:]), lse.reshape(-1)


def _backward(
    residuals: tuple[AttentionInputs, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[AttentionInputs]:
    """The cotangent of the inputs, from those of the output and of the log-sum-exp."""
    inputs, out, lse = residuals
    d_out, d_lse = cotangents
    # d(loss)/d(score) = p * (dp - correction): the row sum of out * d_out, less what arrives through lse.
    correction = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    s = inputs.k.shape[1]
    head = functools.partial(_head_gradients, inputs, d_out, lse, correction)

    def step(totals: tuple[Array, Array], h: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        d_q, d_k_view, d_v_view = head(h)
        kv_head = h // inputs.heads_per_kv_head
        d_k, d_v = (total.at[kv_head].add(view[:s]) for total, view in zip(totals, (d_k_view, d_v_view), strict=True))
        return (d_k, d_v), (d_q, d_k_view[s:], d_v_view[s:])

    # Query heads of one kv head add to its gradient one after another, in float32.
    zeros = (jnp.zeros(inputs.k.shape, jnp.float32), jnp.zeros(inputs.v.shape, jnp.float32))
    (d_k, d_v), (d_q, d_k_extra, d_v_extra) = jax.lax.scan(step, zeros, jnp.arange(inputs.q.shape[0]))
    gradients = [x.astype(inputs.q.dtype) for x in (d_q, d_k, d_v, d_k_extra, d_v_extra)]
    leaves, tree = jax.tree.flatten(inputs)  # the five float arrays come first, then positions and the index
    # JAX's cotangent of an integer is of type float0.
    gradients += [np.zeros(leaf.shape, jax.dtypes.float0) for leaf in leaves[len(gradients) :]]
    return (jax.tree.unflatten(tree, gradients),)


def _head_gradients(
    inputs: AttentionInputs, d_out: Array, lse: Array, correction: Array, h: Array
) -> tuple[Array, Array, Array]:
    """Gradients of head `h`: `d_q [t, d]`, `d_k` and `d_v [s + x, d]`, float32."""
    index = inputs.index
    view = tuple(x.astype(jnp.float32) for x in _head_view(inputs, h))

    def q_block(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * index.block_q, slice_size=index.block_q)
        q_td, d_out_td = rows(inputs.q[h]).astype(jnp.float32), rows(d_out[h]).astype(jnp.float32)
        q_pos, lse_t, correction_t = rows(inputs.q_pos[h]), rows(lse[h]), rows(correction[h])

        def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = carry
            start, k_sd, v_sd, mask = _visit(inputs, view, h, i, q_pos, j)
            scores = jnp.where(mask, q_td @ k_sd.T * inputs.scale, MASKED_SCORE)
            # Recomputed from the log-sum-exp: no weight is kept from the forward pass.
            weights = jnp.where(mask, jnp.exp(scores - lse_t[:, None]), 0.0)
            d_scores = weights * (d_out_td @ v_sd.T - correction_t[:, None]) * inputs.scale
            d_k, d_v = (
                _add_rows(x, start, part) for x, part in ((d_k, d_scores.T @ q_td), (d_v, weights.T @ d_out_td))
            )
            return d_q + d_scores @ k_sd, d_k, d_v

        d_q, d_k, d_v = jax.lax.fori_loop(0, index.count[h, i], step, (jnp.zeros_like(q_td), *carry))
        return (d_k, d_v), d_q

    zeros = jnp.zeros_like(view[0]), jnp.zeros_like(view[1])
    (d_k, d_v), d_q = jax.lax.scan(q_block, zeros, jnp.arange(index.num_q_blocks))
    return d_q.reshape(inputs.q.shape[1:]), d_k, d_v


def _add_rows(array: Array, start: Array, rows: Array) -> Array:
    """`array` with `rows` added to its rows from `start` on."""
    # Whole rows in one piece: a slice that XLA updates in place, where a scatter would have an index for each row.
    old = jax.lax.dynamic_slice_in_dim(array, start, rows.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(array, old + rows, start, axis=0)
