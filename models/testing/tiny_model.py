"""A tiny random model, small enough that a test costs little more than its compilation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.prompt import Prompt
from models.qwen2_5_vl.model import Qwen2_5_VL
from models.testing.configs import TINY_CONFIG
from models.testing.prompts import pad


@functools.cache
def tiny_model() -> Qwen2_5_VL:
    """Random weights and biases, large enough that attention is far from uniform; the same object every time."""
    abstract = nnx.eval_shape(lambda: Qwen2_5_VL(TINY_CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        width = leaf.shape[-2] if "kernel" in name else 1 if "embedding" in name else 16
        values = rng.normal(size=leaf.shape) / np.sqrt(width)
        if "scale" in name:
            values = 1 + 0.2 * values
        return jnp.asarray(2 * values if ".q" in name or "'q'" in name else values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


@jax.jit
def forward(model: Any, prompt: Prompt) -> jax.Array:
    """Logits of every token by the model's dense forward pass; compiled once per shape."""
    return model(prompt)


def last_logits(model: Qwen2_5_VL, prompt: Prompt, num_tokens: int = 64) -> np.ndarray:
    """Logits after each prompt's last token, by the plain forward pass."""
    lengths = np.asarray(prompt.layout.is_real).sum(axis=1)
    return np.asarray(forward(model, pad(prompt, num_tokens)))[np.arange(len(lengths)), lengths - 1]
