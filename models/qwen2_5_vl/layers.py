"""The pieces that the vision tower and the decoder share; `dtype` holds for parameters and computation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

State = Any
"""An `nnx.State`; named so because runtime checks trip over that class's own annotations."""


PIECE_TOKENS = 8192
"""Tokens of a piece in `in_pieces`: enough to fill any matrix unit."""


def linear(in_dim: int, out_dim: int, *, use_bias: bool = True, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """An affine map with a kernel `[in, out]`."""
    return nnx.Linear(in_dim, out_dim, use_bias=use_bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


def rms_norm(num_features: int, epsilon: float, *, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """A root-mean-square norm whose statistics are float32."""
    return nnx.RMSNorm(num_features, epsilon=epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, embed_dim: int, mlp_dim: int, *, use_bias: bool, dtype: Any, rngs: nnx.Rngs):
        """Random weights."""
        self.gate = linear(embed_dim, mlp_dim, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.up = linear(embed_dim, mlp_dim, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.down = linear(mlp_dim, embed_dim, use_bias=use_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b t e"]) -> Float[Array, "*b t e"]:
        """The MLP output before the residual."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def in_pieces(f: Callable[[Array], Array], x: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
    """`f(x)` of a function that treats every token alike, at most `PIECE_TOKENS` tokens at a time.

    The hidden width of an MLP is five times the model's: at a million tokens of 7B it would fill 80 GB.
    """
    b, t, e = x.shape
    num_pieces = -(-t // PIECE_TOKENS)
    if num_pieces <= 1:
        return f(x)
    length = -(-t // num_pieces)
    padded = jnp.pad(x, ((0, 0), (0, num_pieces * length - t), (0, 0)))
    pieces = jnp.moveaxis(padded.reshape(b, num_pieces, length, e), 1, 0)
    return jnp.moveaxis(jax.lax.map(f, pieces), 0, 1).reshape(b, -1, e)[:, :t]


def stack_layers[T](make: Callable[[nnx.Rngs], T], num_layers: int, rngs: nnx.Rngs) -> T:
    """One module whose parameters carry a leading axis of `num_layers` independent draws of `make(rngs)`."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: nnx.Rngs):
        return make(rngs)

    return stacked(rngs)
