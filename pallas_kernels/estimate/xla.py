"""The same in XLA: runs anywhere, holds the scores of a few heads at a time in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.notation import Array, Float, Int32

SCORE_BYTES = 2**31
"""Room for the float32 scores of the heads that are estimated at once; heads beyond it wait their turn."""


def column_mass(
    q: Float[Array, "h q d"], k: Float[Array, "s g d"], kv_head: Int32[Array, " h"], *,
    q_pos: Int32[Array, "h q"], kv_pos: Int32[Array, "n s"], scale: float,
) -> Float[Array, "h s"]:  # fmt: skip
    """Attention mass per key, see `api.column_mass`."""
    heads_per_row = k.shape[1] // kv_pos.shape[0]

    def head(args):
        q, g, q_pos = args
        return attention_rows(q, k[:, g], q_pos, kv_pos[g // heads_per_row], scale).sum(axis=0)

    at_once = max(1, SCORE_BYTES // (4 * q.shape[1] * k.shape[0]))
    return jax.lax.map(head, (q, kv_head, q_pos), batch_size=min(len(q), at_once))


def attention_rows(
    q: Float[Array, "q d"], k: Float[Array, "s d"], q_pos: Int32[Array, " q"], kv_pos: Int32[Array, " s"], scale: float
) -> Float[Array, "q s"]:
    """Softmax of the scores of some queries over all keys they may see, float32; zeros for a query that sees none."""
    scores = jnp.einsum("qd,sd->qs", q, k, preferred_element_type=jnp.float32) * scale
    sees = kv_pos[None, :] <= q_pos[:, None]
    top = jnp.max(scores, axis=1, keepdims=True, where=sees, initial=-jnp.inf)
    weights = jnp.where(sees, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    return weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
