"""Step 3 of 9, estimate: which tokens of the whole prompt stand out to the last queries of a head, and which groups.

All estimates read `last_q` queries (64 in the paper, Alg. 1 and App. C.3) and stay linear in the prompt.
"""

import jax
import jax.numpy as jnp

from mmi_jax.layout import TokenLayout
from mmi_jax.method.kv_views import KeyView
from mmi_jax.method.token_groups import NO_GROUP
from pallas_kernels.notation import Array, Bool, Float, Int32

TYPICAL_FLOOR = 0.25
"""Fraction of the typical attention below which tokens hardly differ; chosen by hand."""

MAX_SALIENCE = 2.0
"""What one token may count for in the search for lines; nats. Without it 3 of those 1,000 prompts are misread."""


def last_queries(member: Bool[Array, " t"], last_q: int) -> Int32[Array, " q"]:
    """The last `last_q` member tokens in any order, -1 where there are fewer."""
    rank_from_end = jnp.cumsum(member[::-1])[::-1] - 1
    place = jnp.where(member, rank_from_end, last_q)  # past the end, where the scatter drops it
    return jnp.full(last_q, -1, jnp.int32).at[place].set(jnp.arange(len(member), dtype=jnp.int32), mode="drop")


def salience(mass: Float[Array, " s"], is_counted: Bool[Array, " s"], layout: TokenLayout) -> Float[Array, " s"]:
    """How far each token stands out of its frame, in nats, at most `MAX_SALIENCE`; 0 where it is not counted.

    Raw attention cannot be folded: one token that everyone attends to, or one frame that the question is about, holds
    more of it than a whole line. In nats, and cut off, such a token counts like one token of a line; against its
    frame's mean a frame as a whole, or the pull towards recent ones, counts for nothing. Far below the typical
    attention all tokens are alike, so that differences among tokens without attention are not taken for structure.

    Of 1,000 random prompts with such tokens, such a frame and such a pull next to a line of 2.5 to 5 nats (made as in
    tests/mmi_jax/bench/test_synthetic.py), raw attention missed 682 lines, this without the cut-off 3, with it none.

    Args:
      mass: attention on each token.
      is_counted: tokens to look at; the neighbours of the estimating queries, say, would drown the rest.
      layout: of the tokens; a frame of one token, or tokens without frames, are compared with all others.
    """
    number = jnp.maximum(is_counted.sum(), 1)
    floor = jnp.where(is_counted, mass, 0.0).sum() / number * 2.0**-20 + 1e-30
    # The geometric mean: the few tokens that must not count here dominate an arithmetic one.
    typical = jnp.exp(jnp.where(is_counted, jnp.log(jnp.maximum(mass, floor)), 0.0).sum() / number)
    level = jnp.log1p(mass / (TYPICAL_FLOOR * typical))
    excess = level - jnp.where(is_counted, level, 0.0).sum() / number
    begins = (layout.frame != jnp.roll(layout.frame, 1)) | (layout.video != jnp.roll(layout.video, 1))
    frame, _, total, number = _segment_sums(begins, excess, is_counted)
    mean = jnp.where(number > 1, total / jnp.maximum(number, 1), 0.0)  # a lone token has no frame to stand out of
    excess -= mean[frame]
    clipped = jnp.where(is_counted, jnp.clip(excess, -MAX_SALIENCE, MAX_SALIENCE), 0.0)
    # Folds read it in other orders: without the barrier XLA would compute all of this at each read.
    return jax.lax.optimization_barrier(clipped)


def fold_score(
    salience: Float[Array, " s"], is_counted: Bool[Array, " s"], view: KeyView
) -> tuple[Float[Array, ""], Int32[Array, ""]]:
    """The group whose tokens stand out most together, and by how much.

    The paper takes the maximum of the folded attention (Alg. 1). A plain maximum cannot compare strides: folding by
    frame repeats every line of a fold by row. So the sum over the `n` tokens of a group is divided by sqrt(n): the
    matched filter for a line of unknown height in noise.

    Args:
      salience: how far each token stands out; 0 where it is not counted.
      is_counted: tokens to look at.
      view: a view sorted by the grouping.

    Returns:
      The score, larger is better and -inf when no token is counted, and the group id.
    """
    token = jnp.maximum(view.order, 0)
    counted = (view.group != NO_GROUP) & is_counted[token]
    _, last, total, number = _segment_sums(view.group != jnp.roll(view.group, 1), salience[token], counted)
    score = jnp.where(number > 0, total / jnp.sqrt(jnp.maximum(number, 1)), -jnp.inf)
    best = jnp.argmax(score)
    return score[best], view.group[last[best]]


def dense_lse(
    q: Float[Array, "q d"], k: Float[Array, "s d"], q_pos: Int32[Array, " q"], kv_pos: Int32[Array, " s"], scale: float
) -> Float[Array, " q"]:
    """Log-sum-exp over all keys that some queries may see, float32; -inf for a query that sees none.

    `exp(lse_of_the_visited_keys - dense_lse)` is the fraction of a query's attention that a plan keeps: its recall.
    """
    scores = jnp.einsum("qd,sd->qs", q, k, preferred_element_type=jnp.float32) * scale
    return jax.nn.logsumexp(scores, axis=1, where=kv_pos[None, :] <= q_pos[:, None])


def _segment_sums(
    begins: Bool[Array, " s"], values: Float[Array, " s"], is_counted: Bool[Array, " s"]
) -> tuple[Array, Array, Array, Array]:
    """The segment of each element; and for each segment its last element, and sum and number of the counted values.

    Differences of running totals: atomic adds to one sum serialise on a GPU. Values of mean 0 keep the
    totals small, and so their rounding. Segments past the last one are empty.
    """
    n = len(begins)
    place = jnp.arange(n, dtype=jnp.int32)
    begins &= place > 0
    segment = jnp.cumsum(begins, dtype=jnp.int32)
    last = jnp.full(n, n - 1, jnp.int32).at[jnp.where(begins, segment - 1, n)].set(place - 1, mode="drop")
    so_far = (jnp.cumsum(x) for x in (jnp.where(is_counted, values, 0.0), is_counted.astype(jnp.int32)))
    total, number = (jnp.diff(x[last], prepend=0) for x in so_far)
    return segment, last, total, number
