"""Attention maps: one head's dense attention weights as small images, in prompt order and in a plan's order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mmi_jax.method.plan import Plan
from pallas_kernels.notation import PAD_KV_POS, AnyArray, Float, Int32

PIXELS = 384
"""Width and height of a map at most."""

ROWS_AT_ONCE = 256
"""Queries whose weights for all keys are held at a time."""

MIN_WEIGHT = 1e-3
"""Fraction of a row's average weight below which a pixel is black."""


def plot_attention(
    plan: Plan,
    head: int,
    q: Float[AnyArray, "t d"],
    k: Float[AnyArray, "s d"],
    pos: Int32[AnyArray, " t"],
    *,
    scale: float,
    title: str,
) -> Figure:
    """One head's dense attention weights before and after the plan's permutation.

    Brightness is the weight over the average weight of the row, so that early and late queries are equally bright. The
    right picture has the plan's rows of queries downwards and its rows of keys to the right, regrouped and gathered
    keys included: neighbours in it are neighbours in the kernel, visited or not.

    Args:
      plan: of one example, of a whole prompt.
      q, k: of the head in prompt order, rotated.
      pos: position of every token, -1 for padding.
    """
    rows, keys = np.asarray(plan.q_order.order[head]), np.concatenate([plan.kv_order, plan.gathered_order[head]])
    used_rows, used_keys = (order[_without_empty_tail(order)] for order in (rows, keys))
    tokens = np.flatnonzero(np.asarray(pos) >= 0).astype(np.int32)
    before = attention_map(q, k, pos, tokens, tokens, scale=scale)
    after = attention_map(q, k, pos, used_rows, used_keys, scale=scale)
    figure = Figure(figsize=(11, 5.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, before, "before: prompt order", "key", "query")
    _draw(right, after, "after: the plan's order", "row of keys", "row of queries")
    figure.suptitle(title, fontsize=10)
    return figure


def attention_map(
    q: Float[AnyArray, "t d"],
    k: Float[AnyArray, "s d"],
    pos: Int32[AnyArray, " t"],
    rows: Int32[np.ndarray, " r"],
    keys: Int32[np.ndarray, " c"],
    *,
    scale: float,
    pixels: int = PIXELS,
) -> Float[np.ndarray, "y x"]:
    """Attention weights over the average weight of their row, averaged over the pairs of each pixel.

    Args:
      rows, keys: tokens along the picture, -1 for an empty row.
    """
    per_row, per_key = -(-len(rows) // pixels), -(-len(keys) // pixels)
    height, width = -(-len(rows) // per_row), -(-len(keys) // per_key)
    rows = np.pad(rows, (0, -len(rows) % ROWS_AT_ONCE), constant_values=-1)
    column = jnp.asarray(np.arange(len(keys)) // per_key)
    total = np.zeros((height + -(-ROWS_AT_ONCE // per_row) + 1, width))
    for first in range(0, len(rows), ROWS_AT_ONCE):
        piece = rows[first : first + ROWS_AT_ONCE]
        summed = np.asarray(
            _summed(q, k, jnp.asarray(pos), jnp.asarray(piece), jnp.asarray(keys), column, scale, width)
        )
        np.add.at(total, (first + np.arange(len(piece))) // per_row, summed)
    return total[:height] / (per_row * per_key)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _summed(q, k, pos, rows, keys, column, scale: float, width: int):
    """Weights of some rows, over the row's average, summed over the keys of each column of pixels."""
    is_row = rows >= 0
    q_pos = jnp.where(is_row, pos[jnp.maximum(rows, 0)], -1)
    kv_pos = jnp.where(pos >= 0, pos, PAD_KV_POS)
    scores = jnp.einsum("qd,sd->qs", q[jnp.maximum(rows, 0)], k, preferred_element_type=jnp.float32) * scale
    is_seen = kv_pos[None] <= q_pos[:, None]
    weights = jax.nn.softmax(scores, axis=1, where=is_seen)
    relative = jnp.where(is_row[:, None], weights * is_seen.sum(axis=1, keepdims=True), 0.0)
    reordered = jnp.where(keys >= 0, relative[:, jnp.maximum(keys, 0)], 0.0)
    return jax.ops.segment_sum(reordered.T, column, width, indices_are_sorted=True).T


def _without_empty_tail(order: np.ndarray) -> slice:
    used = np.flatnonzero(order >= 0)
    return slice(0, int(used[-1]) + 1 if len(used) else 0)


def _draw(axes: Axes, picture: np.ndarray, title: str, x: str, y: str) -> None:
    axes.imshow(np.maximum(picture, MIN_WEIGHT), cmap="inferno", norm=LogNorm(MIN_WEIGHT, 1e2), interpolation="nearest")
    axes.set(title=title, xlabel=x, ylabel=y, xticks=[], yticks=[], aspect="auto")
