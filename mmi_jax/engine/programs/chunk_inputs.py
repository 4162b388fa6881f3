"""ChunkInputs: everything that the compiled programs of one chunk are given."""

import jax
from jaxtyping import PyTree

from mmi_jax.layout import TokenLayout
from pallas_kernels.notation import Array
from pallas_kernels.pytree import pytree


@pytree
class ChunkInputs[A: (Array, jax.ShapeDtypeStruct)]:
    """One chunk of tokens and what it is computed from, arrays or shapes.

    Args:
      state: the model's weights.
      layer_state: those of its layers alone, leading axis the layers.
      rope_pos: rotary positions `[3, b, t]`.
      layout: fields `[b, s]`, of every token of the cache.
      q_start: the place of the chunk's first token in the cache, a scalar.
      x: embeddings `[b, t, e]`; donated.
      k, v: the caches of all layers `[layers, b, s, g, d]`; donated.
      logit_places: places in the cache of the tokens after which logits are computed, `[b, n]`.
      hidden: their last hidden states `[b, n, e]`, of those in earlier chunks.
    """

    state: PyTree
    layer_state: PyTree
    rope_pos: A
    layout: TokenLayout
    q_start: A
    x: A
    k: A
    v: A
    logit_places: A
    hidden: A

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of the cache, which say how a mesh may split it."""
        return self.k.shape[3]
