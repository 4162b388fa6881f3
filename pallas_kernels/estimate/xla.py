"""column_mass and line_mass in XLA: runs anywhere, holds the scores of a few heads at a time in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.notation import Array, Float, Int32

SCORE_BYTES = 2**31
"""Room for the float32 scores of the heads that are estimated at once; more heads run one batch after another."""


def column_mass(
    k: Float[Array, "s g d"],
    kv_pos: Int32[Array, "n s"],
    kv_head: Int32[Array, " h"],
    q: Float[Array, "h q d"],
    q_pos: Int32[Array, "h q"],
    *,
    scale: float,
) -> tuple[Float[Array, "h s"]]:
    """Attention mass per key, see `api.column_mass`."""
    return _each_head(lambda weights, q_row: (weights.sum(axis=0),), k, kv_pos, kv_head, q, q_pos, q_pos, scale)


def line_mass(
    k: Float[Array, "s g d"],
    kv_pos: Int32[Array, "n s"],
    kv_head: Int32[Array, " h"],
    q: Float[Array, "h q d"],
    q_pos: Int32[Array, "h q"],
    q_row: Int32[Array, "h q"],
    *,
    scale: float,
    band: int,
) -> tuple[Float[Array, "h s"], Float[Array, "h bands"]]:
    """Attention mass per key and per band of diagonals, see `api.line_mass`."""

    def masses(weights: Array, q_row: Array) -> tuple[Array, Array]:
        return weights.sum(axis=0), diagonal_mass(weights, q_row, band)

    return _each_head(masses, k, kv_pos, kv_head, q, q_pos, q_row, scale)


def _each_head[T: tuple[Array, ...]](
    masses: Callable[[Array, Array], T],
    k: Float[Array, "s g d"],
    kv_pos: Int32[Array, "n s"],
    kv_head: Int32[Array, " h"],
    q: Float[Array, "h q d"],
    q_pos: Int32[Array, "h q"],
    q_row: Int32[Array, "h q"],
    scale: float,
) -> T:
    """`masses(weights, q_row)` of every head, as many at once as `SCORE_BYTES` allows."""
    heads_per_row = k.shape[1] // kv_pos.shape[0]

    def head(args: tuple[Array, Array, Array, Array]) -> T:
        g, q, q_pos, q_row = args
        return masses(attention_rows(q, k[:, g], q_pos, kv_pos[g // heads_per_row], scale), q_row)

    # Scores are [queries, keys] float32: at a million keys and 64 queries a head's take 256 MiB.
    at_once = max(1, SCORE_BYTES // (4 * q.shape[1] * k.shape[0]))
    return jax.lax.map(head, (kv_head, q, q_pos, q_row), batch_size=min(len(q), at_once))


def attention_rows(
    q: Float[Array, "q d"], k: Float[Array, "s d"], q_pos: Int32[Array, " q"], kv_pos: Int32[Array, " s"], scale: float
) -> Float[Array, "q s"]:
    """Softmax of the scores of some queries over all keys they may see, float32; zeros for a query that sees none."""
    scores = jnp.einsum("qd,sd->qs", q, k, preferred_element_type=jnp.float32) * scale
    sees = kv_pos[None, :] <= q_pos[:, None]
    row_max = jnp.max(scores, axis=1, keepdims=True, where=sees, initial=-jnp.inf)
    weights = jnp.where(sees, jnp.exp(scores - jnp.where(jnp.isfinite(row_max), row_max, 0.0)), 0.0)
    # A query that sees a key has a weight of 1 at its maximum; 1e-30 divides the zeros of one that sees none.
    return weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-30)


def diagonal_mass(weights: Float[Array, "q s"], q_row: Int32[Array, " q"], band: int) -> Float[Array, " n"]:
    """Attention mass by distance from each query's row, in bands, see `api.line_mass`."""
    s = weights.shape[1]
    num_bands = num_bands_of(s, band)
    lead = band // 2

    def shift(weight: Array, at: Array) -> Array:
        # A shift by slicing: as a scatter by distance it would be atomic additions on a GPU.
        padded = jnp.pad(weight[::-1], (0, s))  # padded[s - 1 - at + distance] is the weight at that distance
        by_distance = jax.lax.dynamic_slice_in_dim(padded, s - 1 - at, s)
        return jnp.where(at >= 0, by_distance, 0.0)

    by_distance = jax.vmap(shift)(weights, q_row).sum(axis=0)
    return jnp.pad(by_distance, (lead, num_bands * band - lead - s)).reshape(num_bands, band).sum(axis=1)


def num_bands_of(num_keys: int, band: int) -> int:
    """Bands that hold all distances from 0 up to `num_keys - 1`."""
    return -(-num_keys // band) + 1
