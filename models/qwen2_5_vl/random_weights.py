"""Random weights of any size, drawn on the device in their own dtype: for timing what no checkpoint is here for."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def with_random_weights[M: nnx.Module](abstract: M, seed: int = 0) -> M:
    """The module with arrays in place of shapes: matrices keep the scale of their input, norms are near 1.

    Args:
        abstract: of `nnx.eval_shape`; stays as it is.
        seed: of the draw.
    """
    graphdef, state = nnx.split(abstract)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))  # threefry compiles twice as long
    arrays = [
        _draw(key, leaf.shape, jnp.dtype(leaf.dtype).name, *_moments(jax.tree_util.keystr(path), leaf.shape))
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, arrays))


def _moments(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation: of a norm's scale, of a matrix, of a bias or an embedding."""
    if "scale" in name:
        return 1.0, 0.05
    return 0.0, 1 / math.sqrt(shape[-2]) if "kernel" in name else 0.02


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw(key: Any, shape: tuple[int, ...], dtype: str, mean: float, deviation: float):
    return (mean + deviation * jax.random.normal(key, shape, dtype)).astype(dtype)
