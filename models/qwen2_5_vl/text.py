"""One layer of the Qwen2.5 decoder: grouped-query attention and a gated MLP, each normed before and residual."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.layers import GatedMLP, in_pieces, linear, rms_norm
from models.qwen2_5_vl.rope import rotate

Rotary = tuple[Float[Array, "b t d"], Float[Array, "b t d"]]
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q [b, t, h, d], k [b, t, g, d], v [b, t, g, d]) -> (out [b, t, h, d], anything); q and k after rotation."""


class Attention(nnx.Module):
    """Projections around an `Attend`: biases on q, k and v, none on the output."""

    def __init__(self, config: Qwen2_5_VLConfig, *, dtype: Any, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.config = config
        self.q = linear(config.embed_dim, q_dim, dtype=dtype, rngs=rngs)
        self.k = linear(config.embed_dim, kv_dim, dtype=dtype, rngs=rngs)
        self.v = linear(config.embed_dim, kv_dim, dtype=dtype, rngs=rngs)
        self.out = linear(q_dim, config.embed_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t e"], rotary: Rotary, attend: Attend) -> tuple[Float[Array, "b t e"], Any]:
        """The attention output before the residual, and what `attend` returned besides."""
        b, t, _ = x.shape
        head_dim = self.config.head_dim
        q = rotate(self.q(x).reshape(b, t, self.config.num_heads, head_dim), *rotary)
        k = rotate(self.k(x).reshape(b, t, self.config.num_kv_heads, head_dim), *rotary)
        v = self.v(x).reshape(b, t, self.config.num_kv_heads, head_dim)
        out, aux = attend(q, k, v)
        return self.out(out.reshape(b, t, -1)), aux


class DecoderLayer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: Qwen2_5_VLConfig, *, dtype: Any, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        self.attention_norm = rms_norm(config.embed_dim, config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = rms_norm(config.embed_dim, config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = GatedMLP(config.embed_dim, config.mlp_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t e"], rotary: Rotary, attend: Attend) -> tuple[Float[Array, "b t e"], Any]:
        """The layer's output and, untouched, the second value of `attend` (a cache, statistics)."""
        out, aux = self.attention(self.attention_norm(x), rotary, attend)
        x = x + out
        return x + in_pieces(lambda x: self.mlp(self.mlp_norm(x)), x), aux
