"""Step 7 of 9, plan: the meaning of the patterns for one prompt, as row orders and block lists of all heads."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from mmi_jax.layout import TokenIndex, TokenLayout
from mmi_jax.method.head_plan import HeadPlan, plan_head
from mmi_jax.method.kv_views import AllKeys, Geometry, build_geometry
from mmi_jax.method.permutation import Permutation
from mmi_jax.method.query_parts import PlansQueries
from pallas_kernels import BlockIndex, coverage
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import PAD_KV_POS, AnyArray, Array, Bool, Float, Int32
from pallas_kernels.pytree import pytree, static_field


@pytree
class Plan:
    """Reorder the queries, reorder the keys into the kv view, visit the listed blocks.

    Args:
      q_order: where each query goes, per head.
      kv_order: token of each row of the kv view, one for all heads; -1 for an empty row.
      gathered_order: token of each row gathered for one query head, -1 for an empty row.
      q_pos: position of each query row, per head.
      kv_pos: rows of key positions along the shared view and the gathered rows, chosen by `index.pos_row`.
      index: visited blocks.
      num_keys: kv tokens of the prompt.
    """

    q_order: Permutation
    kv_order: Int32[Array, " s"]
    gathered_order: Int32[Array, "h x"]
    q_pos: Int32[Array, "h r"]
    kv_pos: Int32[Array, "n sx"]
    index: BlockIndex
    num_keys: int = static_field()

    def coverage(self) -> Int32[Array, "h t s"]:
        """How often each (query, key) pair is attended, in original token order; never above 1. Quadratic in memory."""
        visits = coverage(self.index, self.q_pos, self.kv_pos)

        def head(visits: Array, inverse: Array, gathered_order: Array) -> Array:
            rows = jnp.where(inverse[..., None] >= 0, visits[jnp.maximum(inverse, 0)], 0).sum(axis=0)
            tokens = jnp.concatenate([self.kv_order, gathered_order])
            tokens = jnp.where(tokens >= 0, tokens, self.num_keys)
            return jnp.zeros((rows.shape[0], self.num_keys), jnp.int32).at[:, tokens].add(rows, mode="drop")

        return jax.vmap(head)(visits, self.q_order.inverse, self.gathered_order)

    def to_mask(self) -> Bool[Array, "h t s"]:
        """Which pairs are attended, in original token order. Quadratic in memory: for tests and pictures."""
        return self.coverage() > 0

    def density(self) -> Float[Array, " h"]:
        """Visited tiles over the tiles of dense causal attention, per head; float32, may exceed 1 by block rounding."""
        size = jnp.float32(self.index.block_q * self.index.block_kv)
        pos = self.q_pos_of_tokens()
        dense_pairs = jnp.sum(jnp.where(pos >= 0, pos + 1, 0), axis=1, dtype=jnp.float32)
        # A dense causal kernel computes, on average, half a block more per query than the pairs it keeps.
        num_queries = jnp.sum(pos >= 0, axis=1, dtype=jnp.float32)
        rounding = num_queries * (max(self.index.block_q, self.index.block_kv) - 1) / 2
        return self.index.visited_tiles() * size / jnp.maximum(dense_pairs + rounding, 1.0)

    def q_pos_of_tokens(self) -> Int32[Array, "h t"]:
        """Position of every query token, -1 for padding."""
        rows = self.q_order.inverse[:, 0]
        return jnp.where(rows >= 0, jnp.take_along_axis(self.q_pos, jnp.maximum(rows, 0), axis=1), -1)


def plan_batch(
    patterns: Sequence[PlansQueries],
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    geometry: Geometry,
    *,
    scale: float,
    blocks: Blocks,
) -> Plan:
    """The plan of every example of a batch, leading axis b on every array."""
    q, k = jax.lax.stop_gradient((q, k))  # a plan is made of integers; kernels of estimates have no backward pass

    def example(q: Array, k: Array, geometry: Geometry) -> Plan:
        return plan_heads(patterns, q, k, geometry, scale=scale, blocks=blocks)

    if q.shape[0] == 1:  # half the time to trace a layer is Python's work for an axis of one
        return jax.tree.map(lambda x: x[None], example(*jax.tree.map(lambda x: x[0], (q, k, geometry))))
    return jax.vmap(example)(q, k, geometry)


def batch_geometry(
    layout: TokenLayout,
    patterns: Sequence[PlansQueries],
    *,
    batch: int,
    num_queries: int,
    q_start: TokenIndex | None,
    blocks: Blocks,
) -> Geometry:
    """The geometry of every example of a batch, leading axis b on every array."""
    layout = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (batch, x.shape[-1])), layout)
    start = jnp.asarray(layout.num_tokens - num_queries if q_start is None else q_start, jnp.int32)

    def example(layout: TokenLayout) -> Geometry:
        return prompt_geometry(layout, patterns, num_queries=num_queries, q_start=start, blocks=blocks)

    return jax.vmap(example)(layout)


@functools.partial(jax.jit, static_argnames=("patterns", "scale", "blocks"))
def plan_example(
    patterns: tuple[PlansQueries, ...],
    q: Float[Array, "t h d"],
    k: Float[Array, "s g d"],
    layout: TokenLayout,
    q_start: TokenIndex,
    *,
    scale: float,
    blocks: Blocks,
) -> Plan:
    """The plan of one example, geometry included."""
    geometry = prompt_geometry(layout, patterns, num_queries=q.shape[0], q_start=q_start, blocks=blocks)
    return plan_heads(patterns, q, k, geometry, scale=scale, blocks=blocks)


def prompt_geometry(
    layout: TokenLayout,
    patterns: Sequence[PlansQueries],
    *,
    num_queries: int,
    q_start: TokenIndex,
    blocks: Blocks,
) -> Geometry:
    """Everything the patterns read of the prompt's layout: shared by all heads, and by all layers of these patterns."""
    views = tuple(view for pattern in dict.fromkeys(patterns) for view in pattern.views(AllKeys(), blocks))
    return build_geometry(layout, views, blocks, num_queries=num_queries, q_start=q_start)


def plan_heads(
    patterns: Sequence[PlansQueries],
    q: Float[Array, "t h d"],
    k: Float[Array, "s g d"],
    geometry: Geometry,
    *,
    scale: float,
    blocks: Blocks,
) -> Plan:
    """The plan of one example for all heads, each with its pattern.

    Args:
      patterns: one for each query head.
      geometry: made by `prompt_geometry` for these patterns.
      scale: factor on the scores that the estimates read.
    """
    heads_of = {p: [h for h in range(q.shape[1]) if patterns[h] == p] for p in dict.fromkeys(patterns)}
    plans = [_same_pattern(pattern, heads, q, k, geometry, scale, blocks) for pattern, heads in heads_of.items()]
    if len(plans) == 1:
        return plans[0]
    return _take_heads(_merge(plans), np.argsort([h for heads in heads_of.values() for h in heads]))


def _same_pattern(
    pattern: PlansQueries, heads: list[int], q: Array, k: Array, geometry: Geometry, scale: float, blocks: Blocks
) -> Plan:
    """The plan of some heads that have one pattern."""
    ratio = q.shape[1] // k.shape[1]

    def plan(head: Int32[Array, ""]) -> HeadPlan:
        return plan_head(q[:, head], k, head // ratio, geometry, pattern=pattern, scale=scale, blocks=blocks)

    if pattern.reads_scores:
        planned = jax.vmap(plan)(jnp.array(heads))
    else:
        planned = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(heads), *x.shape)), plan(jnp.int32(heads[0])))
    return _of_heads(planned, len(heads), geometry, blocks)


def _of_heads(planned: HeadPlan, num_heads: int, geometry: Geometry, blocks: Blocks) -> Plan:
    """The plan, from the head plans of one pattern with a leading axis h."""
    lists = planned.lists
    if planned.gathered_order is None or planned.kv_pos is None:
        gathered_order = jnp.zeros((num_heads, 0), jnp.int32)
        kv_pos, pos_row = geometry.kv_pos[None], lists.pos_row
    else:
        gathered_order = planned.gathered_order
        first_row = jnp.arange(num_heads, dtype=jnp.int32)[:, None] * planned.kv_pos.shape[1]
        shared_row = jnp.pad(geometry.kv_pos, (0, gathered_order.shape[1]), constant_values=PAD_KV_POS)
        kv_pos = jnp.concatenate([shared_row[None], planned.kv_pos.reshape(-1, len(shared_row))])
        pos_row = jnp.where(lists.pos_row > 0, lists.pos_row + first_row, 0)
    intervals = jnp.asarray(planned.intervals, jnp.int32)
    return Plan(
        q_order=Permutation(order=planned.order, inverse=planned.inverse),
        kv_order=geometry.order,
        gathered_order=gathered_order,
        q_pos=planned.q_pos,
        kv_pos=kv_pos,
        index=BlockIndex(
            first=lists.first,
            num_full=lists.num_full,
            count=lists.count,
            start=lists.start,
            interval=lists.interval,
            intervals=jnp.broadcast_to(intervals, (num_heads, *intervals.shape)),
            pos_row=pos_row,
            block_q=blocks.q,
            block_kv=blocks.kv,
        ),
        num_keys=geometry.keys.num_tokens,
    )


def _merge(plans: list[Plan]) -> Plan:
    """One plan for the heads of several, one after another; lists, rows and gathered rows padded to the longest."""
    num_rows = np.cumsum([0, *(plan.kv_pos.shape[0] for plan in plans)])
    plans = [
        dataclasses.replace(plan, index=dataclasses.replace(plan.index, pos_row=plan.index.pos_row + int(base)))
        for plan, base in zip(plans, num_rows, strict=False)
    ]
    merged = jax.tree.map(lambda *xs: _stack_padded(xs, -1), *plans)
    # Past the entries of a row nothing is read, but empty rows must have no entries and empty key rows no reach.
    count = _stack_padded([plan.index.count for plan in plans], 0)
    return dataclasses.replace(
        merged,
        kv_order=plans[0].kv_order,
        kv_pos=_stack_padded([plan.kv_pos for plan in plans], PAD_KV_POS),
        index=dataclasses.replace(
            merged.index,
            count=count,
            num_full=jnp.minimum(count, jnp.maximum(merged.index.num_full, 0)),
            pos_row=jnp.maximum(merged.index.pos_row, 0),
        ),
    )


def _stack_padded(arrays: Sequence[AnyArray], value: int) -> Array:
    """Arrays one after another along axis 0, all other axes padded at their end to the longest."""
    longest = np.max([x.shape for x in arrays], axis=0)
    padded = [jnp.pad(x, [(0, 0), *((0, n) for n in longest[1:] - x.shape[1:])], constant_values=value) for x in arrays]
    return jnp.concatenate(padded)


def _take_heads(plan: Plan, heads: Int[np.ndarray, " h"]) -> Plan:
    """The plan with its heads in another order."""
    taken = jax.tree.map(lambda x: x[heads], (plan.q_order, plan.gathered_order, plan.q_pos, plan.index))
    q_order, gathered_order, q_pos, index = taken
    return dataclasses.replace(plan, q_order=q_order, gathered_order=gathered_order, q_pos=q_pos, index=index)
