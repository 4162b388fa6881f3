"""The arguments of block-sparse attention, checked once, as every backend receives them."""

import jax.numpy as jnp

from pallas_kernels.block_index import BlockIndex
from pallas_kernels.notation import PAD_KV_POS, Array, Float, Int32
from pallas_kernels.pytree import pytree, static_field


@pytree
class AttentionInputs:
    """Queries, the shared view of keys and values, rows gathered for one head, positions and the index.

    Query head `h` reads kv head `h // (h_total // g)`. Its kv view is the `s` rows of `k`, `v` followed by the `x` rows
    of `k_extra`, `v_extra`; block starts and `kv_pos` count along that view.
    """

    q: Float[Array, "h t d"]
    k: Float[Array, "g s d"]
    v: Float[Array, "g s d"]
    k_extra: Float[Array, "h x d"]
    v_extra: Float[Array, "h x d"]
    q_pos: Int32[Array, "h t"]
    kv_pos: Int32[Array, "n sx"]
    index: BlockIndex
    scale: float = static_field()
    has_zeroed_padding: bool = static_field(default=False)

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share one kv head."""
        return self.q.shape[0] // self.k.shape[0]

    def keys_and_values_per_head(self) -> tuple[Array, ...]:
        """`k` and `v` as each query head sees them, `[h, s + x, d]`: a copy per head, for small inputs only."""
        shared = (jnp.repeat(x, self.heads_per_kv_head, axis=0) for x in (self.k, self.v))
        return tuple(
            jnp.concatenate([x, extra], axis=1) for x, extra in zip(shared, (self.k_extra, self.v_extra), strict=True)
        )


def zero_padding(inputs: AttentionInputs) -> tuple[Float[Array, "g s d"], Float[Array, "h x d"]]:
    """`v` and `v_extra`, which may hold NaN in padding, with zeroed padding: a weight of 0 times NaN is NaN.

    Padding is what every row of positions that the kv head's queries use says is padding.
    """
    num_kv_heads, s = inputs.k.shape[:2]
    rows = jnp.arange(inputs.kv_pos.shape[0])
    is_used = jnp.any(inputs.index.pos_row[:, :, None] == rows[None, None], axis=1)  # [h, n]
    is_real = inputs.kv_pos != PAD_KV_POS

    def zero(v: Array, is_used: Array, is_real: Array) -> Array:
        is_seen = jnp.any(is_used[:, :, None] & is_real[None], axis=1)
        return jnp.where(is_seen[..., None], v, 0)

    by_kv_head = jnp.any(is_used.reshape(num_kv_heads, -1, len(rows)), axis=1)
    return zero(inputs.v, by_kv_head, is_real[:, :s]), zero(inputs.v_extra, is_used, is_real[:, s:])


def check_inputs(inputs: AttentionInputs) -> None:
    """Raises ValueError, with rule, expected and got, for arguments that no backend could honour."""
    (num_q_heads, t, d), (num_kv_heads, s, d_k), x = inputs.q.shape, inputs.k.shape, inputs.k_extra.shape[1]
    index = inputs.index
    rules = [
        (
            min(num_q_heads, num_kv_heads, t) > 0,
            f"there must be heads and queries, got {num_q_heads=}, {num_kv_heads=}, {t=}",
        ),
        (index.start.shape[1] > 0, f"lists must have room for an entry, got index.start {index.start.shape}"),
        (num_q_heads % max(num_kv_heads, 1) == 0, f"{num_q_heads=} must be a multiple of {num_kv_heads=}"),
        (d == d_k, f"q and k must have one head dim: q has {d}, k has {d_k}"),
        (inputs.v.shape == inputs.k.shape, f"v must have k's shape {inputs.k.shape}, got {inputs.v.shape}"),
        (
            inputs.k.dtype == inputs.q.dtype == inputs.v.dtype,
            f"q, k and v must have one dtype: got {inputs.q.dtype}, {inputs.k.dtype}, {inputs.v.dtype}",
        ),
        (
            inputs.k_extra.shape == inputs.v_extra.shape == (num_q_heads, x, d),
            f"k_extra and v_extra must be [{num_q_heads}, x, {d}], got {inputs.k_extra.shape}, {inputs.v_extra.shape}",
        ),
        (
            inputs.k_extra.dtype == inputs.v_extra.dtype == inputs.q.dtype,
            "k_extra and v_extra must have q's dtype "
            f"{inputs.q.dtype}, got {inputs.k_extra.dtype}, {inputs.v_extra.dtype}",
        ),
        (index.num_heads == num_q_heads, f"the index has {index.num_heads} heads, q has {num_q_heads}"),
        (
            index.num_q_blocks * index.block_q == t,
            f"q must have num_q_blocks * block_q = {index.num_q_blocks * index.block_q} tokens, got {t}",
        ),
        (inputs.q_pos.shape == (num_q_heads, t), f"q_pos must be [{num_q_heads}, {t}], got {inputs.q_pos.shape}"),
        (inputs.kv_pos.shape[1] == s + x, f"kv_pos must have s + x = {s + x} positions, got {inputs.kv_pos.shape[1]}"),
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(message)
