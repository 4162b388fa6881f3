"""column_mass and line_mass: attention that a few queries of each head spend on every key, and at every distance."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import run_backend
from pallas_kernels.estimate import mosaic_gpu, xla
from pallas_kernels.notation import Array, Float, Int32

Implementation = Literal["xla", "mosaic_gpu"]

_BACKENDS: dict[Implementation, Any] = {"xla": xla, "mosaic_gpu": mosaic_gpu}

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
      k: keys of all kv heads, in any order; rows that no query may see may hold anything.
      kv_head: the kv head that each head reads.
      q_pos: position of each query, -1 for one that is not there.
      kv_pos: position of each key, for equal runs of kv heads: kv head `j` reads row `j * n // g`.
      scale: factor on the scores.
      implementation: a named backend runs or raises; None walks `DEFAULT_ORDER`.

    Raises:
      ValueError: the shapes do not fit each other, one is empty, or the implementation's name is unknown.
      NotImplementedError: the named backend cannot take this input; the message names the limit.
    """
    _check(q, k, kv_head, q_pos, kv_pos, scale)
    (mass,) = _folding("column_mass", implementation, scale=scale)(k, kv_pos, kv_head, q, q_pos)
    return mass


def line_mass(
    q: Float[Array, "h q d"],
    k: Float[Array, "s g d"],
    kv_head: Int32[Array, " h"],
    *,
    q_pos: Int32[Array, "h q"],
    q_row: Int32[Array, "h q"],
    kv_pos: Int32[Array, "n s"],
    band: int,
    scale: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "h s"], Float[Array, "h bands"]]:
    """`column_mass`, and the same attention summed by distance instead: the mass of each band of diagonals.

    Args:
      q_row: the key row at which each query's distance is 0, one that no key it sees lies beyond; -1 for a query that
        is not there.
      band: keys in a band.

    Returns:
      Mass per key; and per band, `ceil(s / band) + 1` of them: band `n` holds the distances from `n * band - band // 2`
      up to, not including, `n * band + (band + 1) // 2`.
    """
    _check(q, k, kv_head, q_pos, kv_pos, scale)
    if band < 1 or q_row.shape != q_pos.shape:
        raise ValueError(f"{band=} must be at least 1 key, and q_row {q_pos.shape} as q_pos, got {q_row.shape}")
    return _folding("line_mass", implementation, scale=scale, band=band)(k, kv_pos, kv_head, q, q_pos, q_row)


def _check(q: Array, k: Array, kv_head: Array, q_pos: Array, kv_pos: Array, scale: float) -> None:
    """Raises ValueError, with rule and got, for arguments that no backend could honour."""
    rules = [
        (
            min(*q.shape, *k.shape, kv_pos.shape[0]) > 0,
            f"q, k and kv_pos must not be empty: got {q.shape}, {k.shape}, {kv_pos.shape}",
        ),
        (q.shape[2] == k.shape[2], f"q and k must have one head dim: got {q.shape[2]}, {k.shape[2]}"),
        (kv_head.shape == q.shape[:1], f"kv_head must be [{q.shape[0]}], got {kv_head.shape}"),
        (q_pos.shape == q.shape[:2], f"q_pos must be {q.shape[:2]}, got {q_pos.shape}"),
        (kv_pos.shape[1] == k.shape[0], f"kv_pos must have {k.shape[0]} positions in a row, got {kv_pos.shape[1]}"),
        (
            k.shape[1] % max(kv_pos.shape[0], 1) == 0,
            f"kv heads must share the rows of kv_pos evenly: got {k.shape[1]} kv heads, {kv_pos.shape[0]} rows",
        ),
        (math.isfinite(scale), f"scale must be finite, got {scale}"),
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(message)


@functools.cache
def _folding(name: str, implementation: Implementation | None, **static: Any) -> Callable[..., Any]:
    """A backend's function of `(k, kv_pos, kv_head, *arrays of each head)`; a mapped axis is folded into the heads."""
    backends = {backend: getattr(module, name) for backend, module in _BACKENDS.items()}

    # Folded by this rule: mapped by XLA, k was copied for each query head (0.65 ms at 128K tokens, H100,
    # docs/log.md of 2026-11-25).
    @jax.custom_batching.custom_vmap
    def run(*args: Array) -> tuple[Array, ...]:
        return run_backend(backends, DEFAULT_ORDER, implementation, *args, **static)

    @run.def_vmap
    def _(axis_size: int, is_mapped: Sequence[bool], *args: Array):
        k, kv_pos, kv_head, *per_head = (
            x if m else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, m in zip(args, is_mapped, strict=True)
        )
        fold = lambda x: x.reshape(axis_size * x.shape[1], *x.shape[2:])  # noqa: E731
        if is_mapped[0] or is_mapped[1]:  # examples with keys of their own: kv heads side by side
            kv_head += jnp.arange(axis_size, dtype=jnp.int32)[:, None] * k.shape[2]
            k, kv_pos = jnp.moveaxis(k, 0, 1).reshape(k.shape[1], -1, k.shape[3]), fold(kv_pos)
        else:
            k, kv_pos = args[:2]
        out = run(k, kv_pos, fold(kv_head), *map(fold, per_head))
        return tuple(x.reshape(axis_size, -1, x.shape[1]) for x in out), (True,) * len(out)

    return run
