"""Qwen2.5-VL: vision tower, token embeddings, decoder layers, head."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from mmi_jax.layout import PADDING, TokenLayout
from models.prompt import Prompt
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.decoder_layer import Attend, DecoderLayer, Rotary
from models.qwen2_5_vl.embedding import frame_batches, put_rows, vision_places
from models.qwen2_5_vl.layers import linear, rms_norm, stack_layers
from models.qwen2_5_vl.processing.placeholders import num_tokens
from models.qwen2_5_vl.rope import text_rotary
from models.qwen2_5_vl.vision.memory import batch_patches, encoding_bytes
from models.qwen2_5_vl.vision.tower import VisionTower


class Qwen2_5_VL(nnx.Module):
    """The whole model; `layers` is one `DecoderLayer` whose parameters carry a leading layer axis."""

    def __init__(self, config: Qwen2_5_VLConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        dtype = jnp.dtype(dtype)
        self.config = config
        self.dtype = dtype
        self.vision = VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.embedding = nnx.Embed(config.vocab_size, config.embed_dim, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = stack_layers(lambda rngs: DecoderLayer(config, dtype=dtype, rngs=rngs), config.num_layers, rngs)
        self.norm = rms_norm(config.embed_dim, config.rms_norm_eps, dtype=dtype, rngs=rngs)
        if config.tie_embeddings:
            self.head = None
        else:
            self.head = linear(config.embed_dim, config.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)

    def embed(self, prompt: Prompt) -> Float[Array, "b t e"]:
        """Token embeddings, the rows of vision tokens overwritten with the vision tower's output in order.

        A batch of frames is encoded and written at a time, so that one array of embeddings is all that is held.

        Raises:
            ValueError: the number of vision tokens differs from the number the grids make.
        """
        num_vision = sum(num_tokens(grid, self.config) for grid in prompt.grids)
        places = vision_places(prompt, num_vision)
        x = self.embedding(jnp.clip(jnp.asarray(prompt.tokens), 0, self.config.vocab_size - 1))
        before = None
        for frames in frame_batches(prompt.patches, prompt.grids, self.config):
            rows = self.vision(frames.patches, (frames.grid,))
            x = put_rows(x, rows, places[frames.ranks])
            jax.block_until_ready(before)  # two batches of patches are on the device, no more
            before = rows
        return x

    def embed_bytes(self, prompt: Prompt) -> int:
        """Bytes that the vision tower's batches hold, of the frame size whose batches are largest."""
        return max((encoding_bytes(self.config.vision, n, self.dtype) for n in batch_patches(prompt.grids)), default=0)

    def rotary(self, rope_pos: Int32[Array | np.ndarray, "3 b t"]) -> Rotary:
        """Cosine and sine of the rotary angles, float32 `[b, t, d]`."""
        return text_rotary(jnp.asarray(rope_pos), self.config)

    def run_layers(self, x: Float[Array, "b t e"], rotary: Rotary, attend: Attend) -> tuple[Float[Array, "b t e"], Any]:
        """The last layer's output and the second output of `attend`, stacked over layers."""
        graphdef, state = nnx.split(self.layers)
        return jax.lax.scan(lambda x, layer: nnx.merge(graphdef, layer)(x, rotary, attend), x, state)

    def unembed(self, x: Float[Array, "*b e"]) -> Float[Array, "*b v"]:
        """Final norm and head: logits, float32."""
        return next_logits(x, self.norm, self.head, self.embedding)

    def __call__(self, prompt: Prompt, attend: Attend | None = None) -> Float[Array, "b t v"]:
        """Logits of every token, float32; the plain forward pass, dense and causal unless `attend` says otherwise."""
        if attend is None:
            attend = dense_attend(prompt.layout)
        x, _ = self.run_layers(self.embed(prompt), self.rotary(prompt.rope_pos), attend)
        return self.unembed(x)


def next_logits(
    x: Float[Array, "*b e"], norm: nnx.RMSNorm, head: nnx.Linear | None, embedding: nnx.Embed
) -> Float[Array, "*b v"]:
    """Logits, float32, of the last layer's output; through the embedding where the head is tied to it."""
    x = norm(x)
    if head is None:
        return jnp.einsum("...e,ve->...v", x, embedding.embedding[...], preferred_element_type=jnp.float32)
    return jnp.einsum("...e,ev->...v", x, head.kernel[...], preferred_element_type=jnp.float32)


def dense_attend(layout: TokenLayout) -> Attend:
    """Softmax attention over the whole batch of scores: a key is seen iff real and its `pos` at most the query's.

    For checking short prompts: it holds all `[b, h, t, t]` scores.
    """
    pos, is_real = jnp.asarray(layout.pos), jnp.asarray(layout.modality != PADDING)
    mask = (pos[:, None, None, :] <= pos[:, None, :, None]) & is_real[:, None, None, :]

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla"), None

    return attend
