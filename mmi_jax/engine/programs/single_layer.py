"""One layer of a model, run with any attention: what prefill does to every layer, and what a study does to some."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from mmi_jax.engine.protocols import VisionLanguageModel
from pallas_kernels.notation import Array, Float

type Attend = Callable[[Array, Array, Array], tuple[Array, PyTree]]
"""Function that a layer calls on its queries, keys and values, after rotation: output, and anything else."""


def split_layers(model: VisionLanguageModel) -> tuple[Any, Callable[[int], PyTree]]:
    """The graph definition common to all layers, and a function that gives the weights of each by its number."""
    from flax import nnx  # here, so that attention and its benchmarks need no flax

    graphdef, state = nnx.split(model.layers)
    return graphdef, lambda n: jax.tree.map(lambda a: a[n], state)


def run_layer(
    graphdef: Any, weights: PyTree, x: Float[Array, "b t e"], rotary: PyTree, attend: Attend
) -> tuple[Float[Array, "b t e"], PyTree]:
    """The output of a layer that attends so, and the second output of `attend`.

    Args:
      graphdef, weights: of one layer, as `split_layers` gives them.
      rotary: of `model.rotary`.
    """
    from flax import nnx

    layer: Callable[..., tuple[Array, PyTree]] = nnx.merge(graphdef, weights)
    return layer(x, rotary, attend)
