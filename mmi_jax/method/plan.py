"""Plan: the meaning of a pattern for one prompt, as row orders and block lists for all heads."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.layout import TokenLayout
from mmi_jax.method.head_plan import HeadPlan, assemble
from mmi_jax.method.kv_views import AllKeys, Geometry, build_geometry
from mmi_jax.method.patterns.base import Pattern, Scope
from mmi_jax.method.permutation import Permutation
from mmi_jax.method.query_parts import Everything, Part, QBlocks, Runs
from pallas_kernels import BlockIndex, coverage
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import PAD_KV_POS, Array, Bool, Float, Int32
from pallas_kernels.pytree import pytree, static_field


@pytree
class Plan:
    """Reorder the queries, lay out the keys, visit the listed blocks.

    Args:
      q_order: where each query goes, per head.
      kv_order: token of each row of the kv view that all heads share, -1 for an empty row.
      extra_order: token of each row gathered for one query head, -1 for an empty row.
      q_pos: position of each query row, per head.
      kv_pos: rows of key positions along the shared view and the extra rows, chosen by `index.pos_row`.
      index: visited blocks.
      num_keys: kv tokens of the prompt.
    """

    q_order: Permutation
    kv_order: Int32[Array, " s"]
    extra_order: Int32[Array, "h x"]
    q_pos: Int32[Array, "h r"]
    kv_pos: Int32[Array, "n sx"]
    index: BlockIndex
    num_keys: int = static_field()

    def coverage(self) -> Int32[Array, "h t s"]:
        """How often each (query, key) pair is attended, in original token order; never above 1. Quadratic in memory."""
        visits = coverage(self.index, self.q_pos, self.kv_pos)

        def head(visits, inverse, extra_order):
            rows = jnp.where(inverse[..., None] >= 0, visits[jnp.maximum(inverse, 0)], 0).sum(axis=0)
            tokens = jnp.concatenate([self.kv_order, extra_order])
            tokens = jnp.where(tokens >= 0, tokens, self.num_keys)
            return jnp.zeros((rows.shape[0], self.num_keys), jnp.int32).at[:, tokens].add(rows, mode="drop")

        return jax.vmap(head)(visits, self.q_order.inverse, self.extra_order)

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


def plan_heads(
    patterns: Sequence[Pattern], q: Float[Array, "t h d"], k: Float[Array, "s g d"], geometry: Geometry,
    *, scale: float, blocks: Blocks,
) -> Plan:  # fmt: skip
    """The plan of one example for all heads, each with its own pattern.

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


def prompt_geometry(
    layout: TokenLayout, patterns: Sequence[Pattern], *, num_queries: int, q_start, blocks: Blocks
) -> Geometry:
    """Everything the patterns ask of the prompt's layout: shared by all heads, and by all layers of these patterns."""
    views = tuple(view for pattern in dict.fromkeys(patterns) for view in pattern.views(AllKeys(), blocks))
    return build_geometry(layout, views, blocks, num_queries=num_queries, q_start=q_start)


def _same_pattern(pattern: Pattern, heads: list[int], q, k, geometry: Geometry, scale: float, blocks: Blocks) -> Plan:
    """The plan of some heads that share one pattern."""
    ratio = q.shape[1] // k.shape[1]

    def one(head):
        return _plan_head(q[:, head], k, head // ratio, geometry, pattern=pattern, scale=scale, blocks=blocks)

    if pattern.reads_scores:
        planned, extra_order, variants = jax.vmap(one)(jnp.array(heads))
    else:
        shared = one(jnp.int32(heads[0]))
        planned, extra_order, variants = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(heads), *x.shape)), shared)
    num_heads = len(heads)
    if extra_order is None or variants is None:
        extra_order, kv_pos, pos_row = (
            jnp.zeros((num_heads, 0), jnp.int32),
            geometry.kv_pos[None],
            planned.lists.pos_row,
        )
    else:
        own_rows = jnp.arange(num_heads, dtype=jnp.int32)[:, None] * variants.shape[1]
        shared_row = jnp.pad(geometry.kv_pos, (0, extra_order.shape[1]), constant_values=PAD_KV_POS)
        kv_pos = jnp.concatenate([shared_row[None], variants.reshape(-1, len(shared_row))])
        pos_row = jnp.where(planned.lists.pos_row > 0, planned.lists.pos_row + own_rows, 0)
    intervals = jnp.asarray(planned.intervals, jnp.int32)
    return Plan(
        q_order=Permutation(order=planned.order, inverse=planned.inverse),
        kv_order=geometry.order,
        extra_order=extra_order,
        q_pos=planned.q_pos,
        kv_pos=kv_pos,
        index=BlockIndex(
            first=planned.lists.first,
            num_full=planned.lists.num_full,
            count=planned.lists.count,
            start=planned.lists.start,
            interval=planned.lists.interval,
            intervals=jnp.broadcast_to(intervals, (num_heads, *intervals.shape)),
            pos_row=pos_row,
            block_q=blocks.q,
            block_kv=blocks.kv,
        ),
        num_keys=geometry.keys.num_tokens,
    )


@functools.partial(jax.jit, static_argnames=("pattern", "scale", "blocks"))
def _plan_head(
    q: Float[Array, "t d"], k: Float[Array, "s g d"], kv_head, geometry: Geometry,
    *, pattern: Pattern, scale: float, blocks: Blocks,
) -> tuple[HeadPlan, Array | None, Array | None]:  # fmt: skip
    """The head's plan, its gathered tokens [x], and key positions of its own [n, s + x]; None without columns.

    Under jit, so that a pattern is traced once for all layers and tables that name it.
    """
    scope = Scope(
        q=q, all_k=k, kv_head=kv_head, geometry=geometry, member=geometry.queries.is_real, scale=scale, blocks=blocks
    )
    parts = pattern.parts(scope)
    columns = list({id(c): c for part in parts for c in part.columns}.values())
    num_rows = len(geometry.kv_pos)
    num_prompt_rows = len(geometry.view(AllKeys()).order)
    if not columns:
        plan = assemble(parts, [0] * len(parts), geometry.q_pos, [geometry.kv_pos], num_prompt_rows, blocks)
        return plan, None, None
    begins = dict(
        zip(map(id, columns), np.cumsum([num_rows] + [len(c.tokens) for c in columns]).tolist(), strict=False)
    )
    extra = jnp.concatenate([c.tokens for c in columns])
    extra_pos = jnp.where(extra >= 0, geometry.keys.pos[jnp.maximum(extra, 0)], PAD_KV_POS)
    hidden_sets = list(dict.fromkeys(tuple(map(id, part.columns)) for part in parts if part.columns))
    by_id = {id(c): c for c in columns}
    variants = [jnp.pad(geometry.kv_pos, (0, len(extra)), constant_values=PAD_KV_POS)]
    for ids in hidden_sets:
        is_hidden = jnp.stack([by_id[i].is_hidden for i in ids]).any(axis=0)
        variants.append(jnp.concatenate([jnp.where(is_hidden, PAD_KV_POS, geometry.kv_pos), extra_pos]))
    numbers = [1 + hidden_sets.index(tuple(map(id, part.columns))) if part.columns else 0 for part in parts]
    with_columns = [_visit_columns(part, begins, scope) for part in parts]
    plan = assemble(with_columns, numbers, geometry.q_pos, variants, num_prompt_rows, blocks)
    return plan, extra, jnp.stack(variants[1:])


def _visit_columns(part: Part, begins: dict[int, int], scope: Scope) -> Part:
    """The part with one more run for each set of its columns."""
    if not part.columns:
        return part
    visits, block_kv = part.visits, scope.blocks.kv
    assert not isinstance(visits, Everything), "a part that sees everything has nothing to gather"

    def all_visits(q_blocks: QBlocks) -> list[Runs]:
        one = jnp.ones((len(q_blocks.lowest), 1), jnp.int32)
        runs = [Runs(start=begins[id(c)] * one, num_blocks=len(c.tokens) // block_kv * one) for c in part.columns]
        return visits(q_blocks) + runs

    more = scope.num_q_blocks * sum(len(c.tokens) // block_kv for c in part.columns)
    return dataclasses.replace(part, visits=all_visits, max_blocks=part.max_blocks + more)


def _merge(plans: list[Plan]) -> Plan:
    """One plan for the heads of several, one after another; lists, rows and columns padded to the widest."""
    num_rows = np.cumsum([0, *(plan.kv_pos.shape[0] for plan in plans)])
    plans = [
        dataclasses.replace(plan, index=dataclasses.replace(plan.index, pos_row=plan.index.pos_row + int(base)))
        for plan, base in zip(plans, num_rows, strict=False)
    ]
    merged = jax.tree.map(lambda *xs: _stack_padded(xs, -1), *plans)
    # Past a row's own entries nothing is read, but empty rows must have no entries and empty key rows no reach.
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


def _stack_padded(arrays, value):
    """Arrays one after another along axis 0, all other axes padded at their end to the longest."""
    longest = np.max([x.shape for x in arrays], axis=0)
    padded = [jnp.pad(x, [(0, 0), *((0, n) for n in longest[1:] - x.shape[1:])], constant_values=value) for x in arrays]
    return jnp.concatenate(padded)


def _take_heads(plan: Plan, heads) -> Plan:
    """The plan with its heads in another order."""
    taken = jax.tree.map(lambda x: x[heads], (plan.q_order, plan.extra_order, plan.q_pos, plan.index))
    q_order, extra_order, q_pos, index = taken
    return dataclasses.replace(plan, q_order=q_order, extra_order=extra_order, q_pos=q_pos, index=index)
