"""The decoder alone, and biases that give its heads the structure of trained ones: for benchmarks."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from models.interface import HeadShape
from models.prompt import Prompt
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.decoder_layer import Rotary
from models.qwen2_5_vl.model import Qwen2_5_VL, next_logits
from models.qwen2_5_vl.rope import text_rotary

KEY_BIAS = 3.0
"""Size of the key bias at every frequency; the kernels add noise of size 1."""


class Decoder(nnx.Module):
    """A Qwen2.5-VL without its vision tower: every token is looked up in the table, vision tokens too."""

    def __init__(self, model: Qwen2_5_VL):
        """Refers to the model's parameters and copies none."""
        self.config, self.dtype = model.config, model.dtype
        self.embedding, self.layers, self.norm, self.head = model.embedding, model.layers, model.norm, model.head

    def embed(self, prompt: Prompt) -> Float[Array, "b t e"]:
        """Embeddings of the tokens by their ids."""
        return self.embedding(jnp.asarray(prompt.tokens))

    def embed_bytes(self, prompt: Prompt) -> int:
        """None: there is no vision tower."""
        return 0

    def rotary(self, rope_pos: Int32[Array, "3 b t"]) -> Rotary:
        """As `Qwen2_5_VL.rotary`."""
        return text_rotary(jnp.asarray(rope_pos), self.config)

    def unembed(self, x: Float[Array, "*b e"]) -> Float[Array, "*b v"]:
        """As `Qwen2_5_VL.unembed`."""
        return next_logits(x, self.norm, self.head, self.embedding)


def shape_heads(model: Decoder | Qwen2_5_VL, shapes: Sequence[HeadShape]) -> None:
    """Writes the query and key biases of the shapes, one for each query head, into all layers.

    Raises:
        ValueError: another number of shapes than query heads.
    """
    num_heads = model.config.num_heads
    if len(shapes) != num_heads:
        raise ValueError(f"shapes must name one for each of the {num_heads} query heads, got {len(shapes)}")
    q_bias, k_bias = shaped_biases(model.config, shapes)
    attention = model.layers.attention
    for projection, bias in ((attention.q, q_bias), (attention.k, k_bias)):
        assert projection.bias is not None
        projection.bias[...] = jnp.broadcast_to(jnp.asarray(bias, model.dtype), projection.bias.shape)


def shaped_biases(
    config: Qwen2_5_VLConfig, shapes: Sequence[HeadShape]
) -> tuple[Float[np.ndarray, " q"], Float[np.ndarray, " k"]]:
    """Query and key biases whose product is a sum of waves in time, row and column, all of them 1 at distance 0.

    Dimensions i and i + d/2 turn together, so that equal biases of both meet as `cos(frequency * distance)`; over many
    frequencies that is a peak at 0. Low frequencies hardly fall off at all, and are left out of the rows and columns.
    """
    half = config.head_dim // 2
    axis = np.repeat(np.arange(3), config.mrope_section)
    weights = [
        shape.near * (axis == 0) / np.sum(axis == 0) + shape.place * (axis > 0) / np.sum(axis > 0) for shape in shapes
    ]
    k_bias = np.concatenate([np.full(half, KEY_BIAS), np.zeros(half)])
    q_bias = [np.concatenate([w * np.sqrt(config.head_dim) / KEY_BIAS, np.zeros(half)]) for w in weights]
    return np.concatenate(q_bias), np.tile(k_bias, config.num_kv_heads)
