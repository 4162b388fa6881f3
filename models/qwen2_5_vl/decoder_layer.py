"""One layer of the Qwen2.5 decoder: grouped-query attention and a gated MLP, each normed before and residual."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.layers import GatedMLP, in_pieces, linear, over_pieces, rms_norm
from models.qwen2_5_vl.rope import rotate

Rotary = tuple[Float[Array, "b t d"], Float[Array, "b t d"]]
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q [b, t, h, d], k [b, t, g, d], v [b, t, g, d]) -> (out [b, t, h, d], anything); q and k after rotation."""


class Attention(nnx.Module):
    """Projections around an `Attend`: biases on q, k and v, none on the output."""

    def __init__(self, config: Qwen2_5_VLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.config = config
        self.q = linear(config.embed_dim, q_dim, dtype=dtype, rngs=rngs)
        self.k = linear(config.embed_dim, kv_dim, dtype=dtype, rngs=rngs)
        self.v = linear(config.embed_dim, kv_dim, dtype=dtype, rngs=rngs)
        self.out = linear(q_dim, config.embed_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def project(self, x: Float[Array, "b t e"], rotary: Rotary) -> tuple[Array, Array, Array]:
        """Inputs of an `Attend`: q `[b, t, h, d]`, k and v `[b, t, g, d]`."""
        b, t, _ = x.shape
        head_dim = self.config.head_dim
        q = rotate(self.q(x).reshape(b, t, self.config.num_heads, head_dim), *rotary)
        k = rotate(self.k(x).reshape(b, t, self.config.num_kv_heads, head_dim), *rotary)
        return q, k, self.v(x).reshape(b, t, self.config.num_kv_heads, head_dim)

    def mix(self, out: Float[Array, "b t h d"]) -> Float[Array, "b t e"]:
        """The heads' outputs joined: what the residual adds."""
        return self.out(out.reshape(*out.shape[:2], -1))


class DecoderLayer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: Qwen2_5_VLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Random weights; `dtype` holds for parameters and computation."""
        self.attention_norm = rms_norm(config.embed_dim, config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = rms_norm(config.embed_dim, config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = GatedMLP(config.embed_dim, config.mlp_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t e"], rotary: Rotary, attend: Attend) -> tuple[Float[Array, "b t e"], Any]:
        """The layer's output and, untouched, the second value of `attend` (a cache, statistics).

        Everything but `attend` runs over a piece of the tokens at a time, and the output takes the place of `x`: of
        arrays with a row for every token there are x, q, k, v and what `attend` makes of them.
        """

        def project(x, *rotary):
            return self.attention.project(self.attention_norm(x), rotary)

        def finish(x, out):
            x = x + self.attention.mix(out)
            return x + self.mlp(self.mlp_norm(x))

        with jax.named_scope("mmi.project"):
            q, k, v = in_pieces(project, x, *rotary)
        out, aux = attend(q, k, v)
        with jax.named_scope("mmi.mlp"):
            return over_pieces(finish, x, out), aux
