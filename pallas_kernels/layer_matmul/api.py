"""layer_matmul: a few rows times one layer's matrix, read straight from the stacked weights of all layers."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.dispatch import run_backend
from pallas_kernels.layer_matmul import mosaic_gpu, xla
from pallas_kernels.notation import Array, Float, Int32

Implementation = Literal["xla", "mosaic_gpu"]

_BACKENDS: dict[Implementation, Callable[..., Array]] = {"xla": xla.layer_matmul, "mosaic_gpu": mosaic_gpu.layer_matmul}

DEFAULT_ORDER: tuple[Implementation, ...] = ("mosaic_gpu", "xla")
"""What `implementation=None` tries, in this order, until one does not refuse."""


def layer_matmul(
    x: Float[Array, "b e"],
    w: Float[Array, "layers e f"],
    layer: Int32[Array, ""] | int,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "b f"]:
    """`x @ w[layer]` in x's dtype, summed in float32.

    With a few rows the product takes as long as reading the matrix, and on a GPU XLA first copies it out of the stack:
    three times the bytes. A loop over layers that names its layer here reads each matrix once.

    Args:
      x: one row for each prompt.
      w: matrices of all layers, of x's dtype.
      layer: which one.
      implementation: a named backend runs or raises; None walks `DEFAULT_ORDER`.

    Raises:
      ValueError: the arguments do not fit each other, or the implementation's name is unknown.
      NotImplementedError: the named backend cannot take this input; the message names the limit.
    """
    if x.shape[1] != w.shape[1] or x.dtype != w.dtype:
        raise ValueError(
            f"x [b, e] and w [layers, e, f] must share e and dtype: got {x.shape} {x.dtype}, {w.shape} {w.dtype}"
        )
    return run_backend(_BACKENDS, DEFAULT_ORDER, implementation, x, w, jnp.asarray(layer, jnp.int32))
