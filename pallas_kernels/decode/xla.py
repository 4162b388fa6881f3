"""decode_attention in XLA: runs anywhere; float32 scores, and a copy of one layer's values where rows are masked."""

import jax.numpy as jnp

from pallas_kernels.decode.inputs import DecodeInputs
from pallas_kernels.notation import Array, Float, Int32


def attend(inputs: DecodeInputs) -> Float[Array, "b h d"]:
    """See `api.decode_attention`."""
    b, h, d = inputs.q.shape
    q = inputs.q.reshape(b, -1, inputs.heads_per_kv_head, d)
    num_new = jnp.broadcast_to(inputs.num_new, (b,))
    places = ((inputs.k, inputs.v, inputs.lengths), (inputs.k_new, inputs.v_new, num_new))
    rows = [_rows(k[inputs.layer], v[inputs.layer], count) for k, v, count in places]
    scores = [jnp.einsum("bgrd,bsgd->bgrs", q, k, preferred_element_type=jnp.float32) for k, _, _ in rows]
    is_key = jnp.concatenate([is_key for _, _, is_key in rows], axis=1)[:, None, None]
    scores = jnp.where(is_key, jnp.concatenate(scores, axis=-1) * inputs.scale, -jnp.inf)
    row_max = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(row_max), row_max, 0.0))
    row_sum = weights.sum(axis=-1, keepdims=True)
    weights = (weights / jnp.where(row_sum > 0, row_sum, 1.0)).astype(inputs.v.dtype)
    pieces = jnp.split(weights, [inputs.k.shape[2]], axis=-1)
    old, new = (
        jnp.einsum("bgrs,bsgd->bgrd", w, v, preferred_element_type=jnp.float32)
        for w, (_, v, _) in zip(pieces, rows, strict=True)
    )
    return (old + new).astype(inputs.q.dtype).reshape(b, h, d)


def _rows(
    k: Float[Array, "b s g d"], v: Float[Array, "b s g d"], count: Int32[Array, " b"]
) -> tuple[Array, Array, Array]:
    """Keys, values with zeros past `count`, as a weight of 0 times NaN is NaN, and which rows are there."""
    is_key = jnp.arange(k.shape[1])[None] < count[:, None]
    return k, jnp.where(is_key[..., None, None], v, 0), is_key
