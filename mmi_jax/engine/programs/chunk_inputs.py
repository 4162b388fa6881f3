"""ChunkInputs: everything that the compiled programs of one chunk are given."""

from typing import Any

import jax

from mmi_jax.layout import TokenLayout
from pallas_kernels.notation import Array
from pallas_kernels.pytree import pytree

type Shaped = Array | jax.ShapeDtypeStruct
"""An array, or its shape where a program is only compiled."""


@pytree
class ChunkInputs:
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

    state: Any
    layer_state: Any
    rope_pos: Shaped
    layout: TokenLayout
    q_start: Shaped
    x: Shaped
    k: Shaped
    v: Shaped
    logit_places: Shaped
    hidden: Shaped

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of the cache, which say how a mesh may split it."""
        return self.k.shape[3]
