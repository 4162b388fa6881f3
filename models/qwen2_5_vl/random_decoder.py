"""A decoder of random weights on the device, whose heads have the structure that trained heads show: for benchmarks.

On isotropic random queries and keys no sparse pattern exists, and a dynamic method's time means nothing.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from models.prompt import Prompt
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.model import Qwen2_5_VL, next_logits
from models.qwen2_5_vl.random_weights import with_random_weights
from models.qwen2_5_vl.rope import text_rotary
from models.qwen2_5_vl.text import Rotary
from models.qwen2_5_vl.weights import abstract_model

KEY_BIAS = 3.0
"""Size of the key bias at every frequency; the kernels add noise of size 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Scores, in nats, that a head gives at distance 0, by what it looks at; the kernels add noise of about 1 to 2.

    Args:
        near: tokens near in time: the window, and a ripple behind it.
        place: the same row and column, in every frame.
    """

    near: float = 0.0
    place: float = 0.0


class Decoder(nnx.Module):
    """A Qwen2.5-VL without its vision tower: every token is looked up in the table, vision tokens too."""

    def __init__(self, model: Qwen2_5_VL):
        """Shares the model's parameters."""
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


def abstract_decoder(config: Qwen2_5_VLConfig, *, dtype: Any = jnp.bfloat16) -> Decoder:
    """The decoder with shapes in place of arrays: nothing is allocated."""
    return Decoder(abstract_model(config, dtype=dtype))


def random_decoder(
    config: Qwen2_5_VLConfig, shapes: tuple[HeadShape, ...], *, dtype: Any = jnp.bfloat16, seed: int = 0
) -> Decoder:
    """A decoder made on the device, one parameter at a time: the host holds none of it.

    Args:
        shapes: what each query head of every layer looks at.
        seed: of the weights.
    """
    return _drawn(abstract_decoder(config, dtype=dtype), shapes, seed)


def random_model(
    config: Qwen2_5_VLConfig, shapes: tuple[HeadShape, ...], *, dtype: Any = jnp.bfloat16, seed: int = 0
) -> Qwen2_5_VL:
    """As `random_decoder`, the vision tower with it."""
    return _drawn(abstract_model(config, dtype=dtype), shapes, seed)


def _drawn[M: (Decoder, Qwen2_5_VL)](abstract: M, shapes: tuple[HeadShape, ...], seed: int) -> M:
    """The model with weights, its query and key biases those of the shapes."""
    num_heads = abstract.config.num_heads
    if len(shapes) != num_heads:
        raise ValueError(f"shapes must name one for each of the {num_heads} query heads, got {len(shapes)}")
    model = with_random_weights(abstract, seed)
    q_bias, k_bias = shaped_biases(model.config, shapes)
    attention = model.layers.attention
    for projection, bias in ((attention.q, q_bias), (attention.k, k_bias)):
        assert projection.bias is not None
        projection.bias[...] = jnp.broadcast_to(jnp.asarray(bias, model.dtype), projection.bias.shape)
    return model


def shaped_biases(
    config: Qwen2_5_VLConfig, shapes: tuple[HeadShape, ...]
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
