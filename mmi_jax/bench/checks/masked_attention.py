"""Dense attention masked to what a plan's lists visit: a reference that holds one q block's scores at a time.

Nothing is skipped and nothing is summed up online: every query is multiplied with every key in float32, and the mask
says which products count. That is `reference.attend`, whose mask of all pairs has 16 GiB a head at 128K tokens.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.attention.reference import pair_is_attended
from pallas_kernels.notation import Array, Bool, Float

ENTRIES = 512
"""Entries of a list that are marked at a time."""


def attend(inputs: AttentionInputs) -> tuple[Float[Array, "h t d"], Float[Array, "h t"]]:
    """Attention output in the query's dtype and log-sum-exp in float32; a query that attends nothing: zeros, -inf."""
    return jax.lax.map(functools.partial(_head, inputs), jnp.arange(inputs.q.shape[0]))


def _head(inputs: AttentionInputs, h):
    """Output `[t, d]` and log-sum-exp `[t]` of one head."""
    block_q, num_blocks = inputs.index.block_q, inputs.index.num_q_blocks
    keys, values = (
        jnp.concatenate([shared[h // inputs.heads_per_kv_head], extra[h]]).astype(jnp.float32)
        for shared, extra in ((inputs.k, inputs.k_extra), (inputs.v, inputs.v_extra))
    )
    blocks = inputs.q[h].astype(jnp.float32).reshape(num_blocks, block_q, -1)

    def q_block(i):
        mask = visited(inputs, h, i)
        scores = jnp.einsum("td,sd->ts", blocks[i], keys, precision="highest") * inputs.scale
        row_max = jnp.max(scores, axis=1, keepdims=True, where=mask, initial=jnp.finfo(jnp.float32).min)
        weights = jnp.where(mask, jnp.exp(scores - row_max), 0.0)
        row_sum = jnp.sum(weights, axis=1, keepdims=True)
        seen = jnp.where(jnp.any(mask, axis=0)[:, None], values, 0.0)  # 0 times NaN is NaN
        out = jnp.einsum("ts,sd->td", weights, seen, precision="highest") / jnp.where(row_sum > 0, row_sum, 1.0)
        return out.astype(inputs.q.dtype), jnp.where(row_sum > 0, row_max + jnp.log(row_sum), -jnp.inf)[:, 0]

    out, lse = jax.lax.map(q_block, jnp.arange(num_blocks))
    return out.reshape(inputs.q.shape[1:]), lse.reshape(-1)


def visited(inputs: AttentionInputs, h, i) -> Bool[Array, "q s"]:
    """Which keys of the joint view each query of q block `i` of head `h` attends, by the rule of `BlockIndex`."""
    index = inputs.index
    intervals, kv_pos = index.intervals[h], inputs.kv_pos[index.pos_row[h, i]]
    q_pos = jax.lax.dynamic_slice_in_dim(inputs.q_pos[h], i * index.block_q, index.block_q)

    def add(chunk, marks):
        """Row 0 of the marks: the key lies in a full block; row 1 + n: in a partial one of interval `n`."""
        j = chunk * ENTRIES + jnp.arange(ENTRIES)
        entry = jnp.minimum(index.first[h, i] + j, index.start.shape[1] - 1)
        row = jnp.where(j < index.num_full[h, i], 0, 1 + index.interval[h, entry])
        keys = index.start[h, entry][:, None] + jnp.arange(index.block_kv)[None]
        keys = jnp.where((j < index.count[h, i])[:, None], keys, len(kv_pos))
        return marks.at[row[:, None], keys].set(True, mode="drop")

    marks = jnp.zeros((1 + len(intervals), len(kv_pos)), bool)
    marks = jax.lax.fori_loop(0, -(-index.count[h, i] // ENTRIES), add, marks)
    mask = jnp.broadcast_to(marks[:1], (index.block_q, len(kv_pos)))
    for n in range(len(intervals)):
        mask |= marks[1 + n][None] & pair_is_attended(q_pos, kv_pos, intervals[n])
    return mask
