"""What the last queries say of the whole prompt: column, diagonal and fold scores of one head.

All estimates read `last_q` queries (64 in the paper, Alg. 1 and App. C.3) and stay linear in the prompt.
"""

import jax
import jax.numpy as jnp

from mmi_jax.keys import NO_KEY
from mmi_jax.views import KeyView
from pallas_kernels.notation import Array, Bool, Float, Int32


def last_queries(member: Bool[Array, " t"], last_q: int) -> Int32[Array, " q"]:
    """The last `last_q` member tokens in any order, -1 where there are fewer."""
    rank_from_end = jnp.cumsum(member[::-1])[::-1] - 1
    place = jnp.where(member, rank_from_end, last_q)
    return jnp.full(last_q, -1, jnp.int32).at[place].set(jnp.arange(len(member), dtype=jnp.int32), mode="drop")


def attention_rows(
    q: Float[Array, "q d"], k: Float[Array, "s d"], q_pos: Int32[Array, " q"], kv_pos: Int32[Array, " s"], scale: float
) -> Float[Array, "q s"]:
    """Softmax of the scores of some queries over all keys they may see, float32; zeros for a query that sees none."""
    scores = jnp.einsum("qd,sd->qs", q, k, preferred_element_type=jnp.float32) * scale
    sees = kv_pos[None, :] <= q_pos[:, None]
    top = jnp.max(scores, axis=1, keepdims=True, where=sees, initial=-jnp.inf)
    weights = jnp.where(sees, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    return weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-30)


def diagonal_mass(weights: Float[Array, "q s"], anchor: Int32[Array, " q"], width: int) -> Float[Array, " n"]:
    """Attention mass by distance from each query's anchor, in bands of `width` keys around multiples of `width`.

    Args:
      weights: attention of some queries over the rows of a view.
      anchor: the row of the view at which each query's distance is 0; -1 for a query to leave out.

    Returns:
      Mass of band `n`: distances `n * width - width // 2` up to, not including, `n * width + (width + 1) // 2`.
    """
    s = weights.shape[1]
    num_bands = -(-s // width) + 1
    lead = width // 2

    def add(total, row):
        weight, at = row
        padded = jnp.pad(weight[::-1], (0, s))  # padded[s - 1 - at + distance] is the weight at that distance
        by_distance = jax.lax.dynamic_slice_in_dim(padded, s - 1 - at, s)
        return total + jnp.where(at >= 0, by_distance, 0.0), None

    by_distance, _ = jax.lax.scan(add, jnp.zeros(s, weights.dtype), (weights, anchor))
    return jnp.pad(by_distance, (lead, num_bands * width - lead - s)).reshape(num_bands, width).sum(axis=1)


def fold_score(
    mass: Float[Array, " s"], is_counted: Bool[Array, " s"], view: KeyView
) -> tuple[Float[Array, ""], Int32[Array, ""]]:
    """The key whose tokens hold the most attention beyond their share, and by how much.

    The paper takes the maximum of the folded attention (Alg. 1). A plain maximum cannot compare strides: folding by
    frame repeats every line of a fold by row. So the excess over the mean, summed over the `n` tokens of a key, is
    divided by sqrt(n): the matched filter for a line of unknown height in noise.

    Args:
      mass: attention on each token.
      is_counted: tokens to look at; the neighbours of the estimating queries, say, would drown the rest.
      view: a view sorted by the key.

    Returns:
      The score, larger is better and -inf when no token is counted, and the key.
    """
    token = jnp.maximum(view.order, 0)
    counted = (view.key != NO_KEY) & is_counted[token]
    mass = jnp.where(counted, mass[token], 0.0)
    expected = mass.sum() / jnp.maximum(counted.sum(), 1)
    begins = jnp.concatenate([jnp.ones(1, bool), view.key[1:] != view.key[:-1]])
    segment = jnp.cumsum(begins) - 1
    excess, number = (
        jax.ops.segment_sum(x, segment, len(segment), indices_are_sorted=True)
        for x in (jnp.where(counted, mass - expected, 0.0), counted.astype(jnp.float32))
    )
    score = jnp.where(number > 0, excess / jnp.sqrt(jnp.maximum(number, 1.0)), -jnp.inf)
    best = jnp.argmax(score)
    return score[best], view.key[jnp.argmax(segment == best)]


def dense_lse(
    q: Float[Array, "q d"], k: Float[Array, "s d"], q_pos: Int32[Array, " q"], kv_pos: Int32[Array, " s"], scale: float
) -> Float[Array, " q"]:
    """Log-sum-exp over all keys that some queries may see, float32; -inf for a query that sees none.

    `exp(lse_of_the_visited_keys - dense_lse)` is the share of a query's attention that a plan keeps: its recall.
    """
    scores = jnp.einsum("qd,sd->qs", q, k, preferred_element_type=jnp.float32) * scale
    return jax.nn.logsumexp(scores, axis=1, where=kv_pos[None, :] <= q_pos[:, None])
