"""KVCache: keys and values of every layer, in their final layout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mmi_jax.layout import PADDING, TokenLayout
from pallas_kernels.notation import Array, Float, Int32
from pallas_kernels.pytree import pytree


@pytree
class KVCache:
    """Keys and values of every layer, and what is known of their tokens; decoding reads it.

    Args:
      k, v: keys after rotation, and values, per layer; `s` is the capacity in tokens.
      lengths: tokens of each example, left-packed.
      next_rope_pos: rotary position of the next token, the same on all axes.
      layout: of those tokens; padding past them.
    """

    k: Float[Array, "layers b s g d"]
    v: Float[Array, "layers b s g d"]
    lengths: Int32[Array, " b"]
    next_rope_pos: Int32[Array, " b"]
    layout: TokenLayout

    @property
    def capacity(self) -> int:
        """Tokens that each example can hold."""
        return self.k.shape[2]

    def reclaim(self, later: "KVCache") -> "KVCache":
        """This cache in the memory of one that a later prefill made from it with `donates_cache`.

        A later prefill writes behind these tokens and leaves them as they are; what it wrote is forgotten, and its
        memory serves the next question. `later` must not be used afterwards by a prefill that donates.

        Raises:
          ValueError: `later` has a smaller capacity than this cache, or holds other sizes.
        """
        mine, theirs = self.layout.modality.shape, later.layout.modality.shape
        if mine[0] != theirs[0] or mine[1] > theirs[1]:
            raise ValueError(f"a later cache must hold these prompts and more: this is {mine}, got one of {theirs}")
        layout = jax.tree.map(jnp.asarray, self.layout.pad_to(theirs[1]))
        return dataclasses.replace(self, k=later.k, v=later.v, layout=layout)


def empty_cache(
    *,
    num_layers: int,
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
    sharding: jax.sharding.Sharding | None = None,
) -> KVCache:
    """A cache without tokens, of `capacity` for each example; keys and values lie on the devices of `sharding`."""
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


def with_capacity(k: Array, capacity: int, *, donates: bool) -> Array:
    """Keys or values of all layers padded to `capacity` tokens, in separate memory.

    Args:
      donates: whether `k` is donated: its memory is taken over where it suffices, and freed otherwise.
    """
    if k.shape[2] == capacity:
        return k if donates else jnp.copy(k)
    larger = _enlarged(k, capacity)
    if donates:
        jax.block_until_ready(larger)
        k.delete()
    return larger


@functools.partial(jax.jit, static_argnames="capacity")
def _enlarged(k: Array, capacity: int) -> Array:
    return jnp.pad(k, [(0, 0), (0, 0), (0, capacity - k.shape[2]), (0, 0), (0, 0)])
