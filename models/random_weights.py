"""Random weights of any size, drawn on the device in the model's dtype: for benchmarks without a checkpoint.

On isotropic random queries and keys no sparse pattern exists, and a dynamic method's time means nothing: `HeadShape`s
give heads the structure that trained heads show.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.families import family_of
from models.interface import HeadShape, ModelConfig


def random_model(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    shapes: Sequence[HeadShape] = (),
    has_vision: bool = True,
    seed: int = 0,
) -> Any:
    """A model made on the device, one parameter at a time: the host holds none of it.

    Args:
        config: sizes of any family.
        dtype: of parameters and computation.
        shapes: what each query head of every layer attends to; random without them.
        has_vision: else the decoder alone, which looks vision tokens up in the embedding.
        seed: of the weights.

    Raises:
        ValueError: another number of shapes than query heads.
    """
    family = family_of(config)
    abstract = family.abstract_model(config, dtype=dtype)
    model = with_random_weights(abstract if has_vision else family.without_vision(abstract), seed)
    if shapes:
        family.shape_heads(model, shapes)
    return model


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
