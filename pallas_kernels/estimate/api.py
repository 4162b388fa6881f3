"""column_mass: attention that a few queries of each head spend on every key."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.estimate import mosaic_gpu, xla
from pallas_kernels.notation import Array, Float, Int32

Implementation = Literal["xla", "mosaic_gpu"]

_BACKENDS: dict[Implementation, Callable[..., Array]] = {"xla": xla.column_mass, "mosaic_gpu": mosaic_gpu.column_mass}

DEFAULT_ORDER: tuple[Implementation, ...] = ("mosaic_gpu", "xla")
"""What `implementation=None` tries, in this order, until one does not refuse."""


def column_mass(
    q: Float[Array, "h q d"],
    k: Float[Array, "s g d"],
    kv_head: Int32[Array, " h"],
    *,
    q_pos: Int32[Array, "h q"],
    kv_pos: Int32[Array, "n s"],
    scale: float,
    implementation: Implementation | None = None,
) -> Float[Array, "h s"]:
    """Softmax attention of some queries of each head over all keys, summed over the queries; float32.

    Under `jax.vmap` the mapped axis joins the heads, so that heads share their keys instead of copying them.

    Args:
      q: a few queries of each head, in any order.
      k: keys of all kv heads, in prompt order; rows that nobody may see may hold anything.
      kv_head: the kv head that each head reads.
      q_pos: position of each query, -1 for one that is not there.
      kv_pos: position of each key, for equal runs of kv heads: kv head `j` reads row `j * n // g`.
      scale: factor on the scores.
      implementation: a named backend runs or raises; None walks `DEFAULT_ORDER`.

    Raises:
      ValueError: the implementation's name is unknown.
      NotImplementedError: the named backend cannot take this input; the message names the limit.
    """
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} is unknown: expected one of {get_args(Implementation)} or None")
    return _folding(scale, implementation)(q, k, kv_head, q_pos, kv_pos)


@functools.cache
def _folding(scale: float, implementation: Implementation | None):
    """The estimate with this scale, whose batching rule folds a mapped axis into the heads."""

    @jax.custom_batching.custom_vmap
    def run(q, k, kv_head, q_pos, kv_pos):
        for name in DEFAULT_ORDER if implementation is None else (implementation,):
            try:
                return _BACKENDS[name](q, k, kv_head, q_pos=q_pos, kv_pos=kv_pos, scale=scale)
            except NotImplementedError:
                if name == implementation:
                    raise
        raise AssertionError("xla refuses nothing")

    @run.def_vmap
    def _(axis_size, is_mapped, *args):
        mapped = tuple(is_mapped)
        q, k, kv_head, q_pos, kv_pos = (
            x if m else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, m in zip(args, mapped, strict=True)
        )
        fold = lambda x: x.reshape(axis_size * x.shape[1], *x.shape[2:])  # noqa: E731
        if mapped[1] or mapped[4]:  # examples with keys of their own: kv heads side by side
            kv_head += jnp.arange(axis_size, dtype=jnp.int32)[:, None] * k.shape[2]
            k, kv_pos = jnp.moveaxis(k, 0, 1).reshape(k.shape[1], -1, k.shape[3]), fold(kv_pos)
        else:
            k, kv_pos = args[1], args[4]
        out = run(fold(q), k, fold(kv_head), fold(q_pos), kv_pos)
        return out.reshape(axis_size, -1, out.shape[1]), True

    return run
