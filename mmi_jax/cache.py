"""KVCache: keys and values of every layer, in their final layout."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.layout import PADDING, TokenLayout
from pallas_kernels.notation import Array, Float, Int32
from pallas_kernels.pytree import pytree


@pytree
class KVCache:
    """What decoding reads.

    Args:
      k, v: keys after rotation, and values, per layer; `s` is the capacity in tokens.
      lengths: tokens held for each example, left-packed.
      next_rope_pos: rotary position of the next token, the same on all axes.
      layout: of the tokens held; padding past them.
    """

    k: Float[Array, "layers b s g d"]
    v: Float[Array, "layers b s g d"]
    lengths: Int32[Array, " b"]
    next_rope_pos: Int32[Array, " b"]
    layout: TokenLayout

    @property
    def capacity(self) -> int:
        """Tokens that each example has room for."""
        return self.k.shape[2]


def empty_cache(
    *, num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype, sharding: Any = None
) -> KVCache:
    """A cache with room for `capacity` tokens of each example; keys and values are laid out as `sharding` says."""
    shape = (num_layers, batch, capacity, num_kv_heads, head_dim)
    absent = np.full((batch, capacity), PADDING, np.int32)
    return KVCache(
        k=jnp.zeros(shape, dtype, device=sharding),
        v=jnp.zeros(shape, dtype, device=sharding),
        lengths=jnp.zeros(batch, jnp.int32),
        next_rope_pos=jnp.zeros(batch, jnp.int32),
        layout=jax.tree.map(
            jnp.asarray,
            TokenLayout(modality=absent, video=absent, frame=absent, row=absent, column=absent, pos=absent),
        ),
    )
