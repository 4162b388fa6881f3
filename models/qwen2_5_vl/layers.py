"""Building blocks of the vision tower and the decoder; `dtype` holds for parameters and computation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

State = Any
"""An `nnx.State`; an alias, because runtime type checks fail on that class's own annotations."""


PIECE_TOKENS = 8192
"""Tokens of a piece in `in_pieces` and `over_pieces`: enough to fill any matrix unit."""


def linear(in_dim: int, out_dim: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """An affine map with a kernel `[in, out]`."""
    return nnx.Linear(in_dim, out_dim, use_bias=use_bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


def rms_norm(num_features: int, epsilon: float, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """A root-mean-square norm whose statistics are float32."""
    return nnx.RMSNorm(num_features, epsilon=epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, embed_dim: int, mlp_dim: int, *, use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        """Random weights."""
        self.gate = linear(embed_dim, mlp_dim, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.up = linear(embed_dim, mlp_dim, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.down = linear(mlp_dim, embed_dim, use_bias=use_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b t e"]) -> Float[Array, "*b t e"]:
        """The MLP output before the residual."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def in_pieces[T](f: Callable[..., T], *arrays: Float[Array, "b t *_"]) -> T:
    """`f(*arrays)` of a function that treats every token alike, at most `PIECE_TOKENS` tokens at a time.

    The hidden width of an MLP is five times the model's: at a million tokens of 7B it would fill 80 GB.

    Args:
        f: of arrays `[b, t, ...]`, returns such arrays.
        *arrays: of the same `b` and `t`.
    """
    b, t = arrays[0].shape[:2]
    num_pieces = _num_pieces(t)
    if num_pieces == 1:
        return f(*arrays)
    length = -(-t // num_pieces)
    if padding := num_pieces * length - t:
        arrays = tuple(jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)]) for x in arrays)
    pieces = jax.lax.map(lambda start: f(*_piece(arrays, start, length)), length * jnp.arange(num_pieces))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, num_pieces * length, *x.shape[3:])[:, :t], pieces)


def over_pieces(
    f: Callable[..., Array], x: Float[Array, "b t e"], *arrays: Float[Array, "b t *_"]
) -> Float[Array, "b t e"]:
    """`f(x, *arrays)` in pieces as of `in_pieces`, each written over its piece of `x`: no second `x` is held."""
    num_pieces = _num_pieces(x.shape[1])
    length = x.shape[1] // num_pieces
    if num_pieces == 1 or num_pieces * length != x.shape[1]:
        return in_pieces(f, x, *arrays)

    def step(n, x):
        start = n * length
        return jax.lax.dynamic_update_slice_in_dim(x, f(*_piece((x, *arrays), start, length)), start, axis=1)

    return jax.lax.fori_loop(0, num_pieces, step, x)


def _num_pieces(num_tokens: int) -> int:
    """The fewest pieces of at most `PIECE_TOKENS`; up to twice as many where these come out equal."""
    fewest = max(1, -(-num_tokens // PIECE_TOKENS))
    return next((n for n in range(fewest, 2 * fewest + 1) if num_tokens % n == 0), fewest)


def _piece(arrays: tuple[Array, ...], start, length: int) -> list[Array]:
    return [jax.lax.dynamic_slice_in_dim(x, start, length, axis=1) for x in arrays]


def stack_layers[T](make: Callable[[nnx.Rngs], T], num_layers: int, rngs: nnx.Rngs) -> T:
    """One module whose parameters carry a leading axis of `num_layers` independent draws of `make(rngs)`."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: nnx.Rngs):
        return make(rngs)

    return stacked(rngs)
