"""Step 6 of 9, head plan: from a pattern's parts to row order, positions, runs and so the block lists of one head.

The method ends at runs: what becomes of them (`pallas_kernels.block_lists`) knows no pattern.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from mmi_jax.method.kv_views import AllKeys, Geometry
from mmi_jax.method.query_parts import Everything, GatheredRows, Part, PlansQueries, QBlocks, Runs, Scope
from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.block_lists.api import block_lists
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.inputs import BlockLists, BlockRuns, ListInputs, list_capacity
from pallas_kernels.notation import PAD_KV_POS, PAD_Q_POS, Array, Bool, Float, Int32
from pallas_kernels.pytree import pytree, static_field


@pytree
class HeadPlan:
    """The plan of one head; fields as in `Plan`, without the head axis.

    Args:
      gathered_order: None where nothing was gathered.
      kv_pos: rows of key positions along the joint kv view and the gathered rows, one for each combination of gathered
        sets that some part sees; None where nothing was gathered.
      lists: `pos_row` 0 reads the positions that are common to all heads, `n` row `n - 1` of `kv_pos`.
    """

    order: Int32[Array, " r"]
    inverse: Int32[Array, "n t"]
    q_pos: Int32[Array, " r"]
    gathered_order: Int32[Array, " x"] | None
    kv_pos: Int32[Array, "m sx"] | None
    lists: BlockLists
    intervals: tuple[tuple[int, int], ...] = static_field()


@functools.partial(jax.jit, static_argnames=("pattern", "scale", "blocks"))
def plan_head(
    q: Float[Array, "t d"],
    k: Float[Array, "s g d"],
    kv_head: Int32[Array, ""],
    geometry: Geometry,
    *,
    pattern: PlansQueries,
    scale: float,
    blocks: Blocks,
) -> HeadPlan:
    """The plan of a head that reads `kv_head`. Under jit, so that a pattern is traced once for all layers with it."""
    member = jnp.asarray(geometry.queries.is_real)
    scope = Scope(q=q, all_k=k, kv_head=kv_head, geometry=geometry, member=member, scale=scale, blocks=blocks)
    parts = pattern.parts(scope)
    gathered = {rows.number: rows for part in parts for rows in part.gathered}
    if not gathered:
        return _assemble(parts, [0] * len(parts), [geometry.kv_pos], geometry, blocks)
    begins = _first_rows(gathered, len(geometry.kv_pos))
    order = jnp.concatenate([rows.tokens for rows in gathered.values()])
    gathered_pos = jnp.where(order >= 0, geometry.keys.pos[jnp.maximum(order, 0)], PAD_KV_POS)
    combinations = list(dict.fromkeys(_numbers(part) for part in parts if part.gathered))
    kv_pos = [jnp.pad(geometry.kv_pos, (0, len(order)), constant_values=PAD_KV_POS)]
    for numbers in combinations:
        is_hidden = jnp.stack([gathered[n].is_hidden for n in numbers]).any(axis=0)
        kv_pos.append(jnp.concatenate([jnp.where(is_hidden, PAD_KV_POS, geometry.kv_pos), gathered_pos]))
    pos_rows = [1 + combinations.index(_numbers(part)) if part.gathered else 0 for part in parts]
    parts = [_visiting_gathered(part, begins, scope) for part in parts]
    plan = _assemble(parts, pos_rows, kv_pos, geometry, blocks)
    return dataclasses.replace(plan, gathered_order=order, kv_pos=jnp.stack(kv_pos[1:]))


def _numbers(part: Part) -> tuple[int, ...]:
    return tuple(rows.number for rows in part.gathered)


def _first_rows(gathered: Mapping[int, GatheredRows], num_rows: int) -> dict[int, int]:
    """Where each gathered set begins, one after another past the `num_rows` rows of the joint kv view."""
    begins: dict[int, int] = {}
    for number, rows in gathered.items():
        begins[number] = num_rows
        num_rows += len(rows.tokens)
    return begins


def _visiting_gathered(part: Part, begins: Mapping[int, int], scope: Scope) -> Part:
    """The part with one more run for each of its gathered sets."""
    if not part.gathered:
        return part
    visits, block_kv = part.visits, scope.blocks.kv
    assert not isinstance(visits, Everything), "a part that sees everything has nothing to gather"

    def all_visits(q_blocks: QBlocks) -> list[Runs]:
        shape = (len(q_blocks.min_pos), 1)
        runs = [
            Runs(
                start=jnp.full(shape, begins[rows.number], jnp.int32),
                num_blocks=jnp.full(shape, len(rows.tokens) // block_kv, jnp.int32),
            )
            for rows in part.gathered
        ]
        return visits(q_blocks) + runs

    more = scope.num_q_blocks * sum(len(rows.tokens) // block_kv for rows in part.gathered)
    return dataclasses.replace(part, visits=all_visits, max_blocks=part.max_blocks + more)


def _assemble(
    parts: Sequence[Part], pos_rows: Sequence[int], kv_pos: Sequence[Array], geometry: Geometry, blocks: Blocks
) -> HeadPlan:
    """The head's plan.

    Args:
      parts: those of pass 0 hold every query that is not padding exactly once.
      pos_rows: for each part, the row of `kv_pos` it reads.
      kv_pos: position of every row of the joint kv view, gathered rows last.
    """
    q_pos = geometry.q_pos
    order, inverse, part_of_block = _rows(parts, len(q_pos), blocks)
    row_pos = jnp.where(order >= 0, q_pos[jnp.maximum(order, 0)], PAD_Q_POS)
    q_blocks = _q_blocks(order, row_pos, blocks)
    pos_row = jnp.asarray(pos_rows, jnp.int32)[part_of_block]
    runs, intervals, sees_everything = _runs(parts, part_of_block, q_blocks)
    num_kv_blocks = len(geometry.view(AllKeys()).order) // blocks.kv
    max_blocks = sum(part.max_blocks for part in parts if not isinstance(part.visits, Everything))
    lists = block_lists(
        ListInputs(
            runs=runs,
            q_min=q_blocks.min_pos,
            q_max=q_blocks.max_pos,
            kv_pos=tuple(kv_pos),
            pos_row=pos_row,
            visits_all=sees_everything,
            takes_over=jnp.arange(len(part_of_block)) < len(part_of_block) // inverse.shape[0],
            intervals=intervals,
            num_shared=num_kv_blocks,
            capacity=list_capacity(max_blocks, len(part_of_block), num_kv_blocks),
            blocks=blocks,
        )
    )
    return HeadPlan(
        order=order,
        inverse=inverse,
        q_pos=row_pos,
        gathered_order=None,
        kv_pos=None,
        lists=lists,
        intervals=intervals,
    )


def _rows(parts: Sequence[Part], num_tokens: int, blocks: Blocks) -> tuple[Array, Array, Array]:
    """Row order of all passes one after another, each token's rows, and the part of each q block."""
    num_passes = 1 + max(part.query_pass for part in parts)
    per_pass = [[(n, part) for n, part in enumerate(parts) if part.query_pass == m] for m in range(num_passes)]
    num_rows = blocks.round_q(num_tokens) + (max(map(len, per_pass)) - 1) * blocks.q
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    orders: list[Array] = []
    inverses: list[Array] = []
    part_ids: list[Array] = []
    for query_pass, numbered in enumerate(per_pass):
        inverse = jnp.full(num_tokens, -1, jnp.int32)
        part_id = jnp.zeros(num_rows // blocks.q, jnp.int32)
        offset = jnp.int32(0)
        for n, part in numbered:
            inverse = jnp.where(part.member, offset + _rank(part), inverse)
            part_id = jnp.where(jnp.arange(len(part_id)) * blocks.q >= offset, n, part_id)
            offset += -(-jnp.sum(part.member, dtype=jnp.int32) // blocks.q) * blocks.q
        row = jnp.where(inverse >= 0, inverse, num_rows)  # past the end, where the scatter drops it: shapes are static
        orders.append(jnp.full(num_rows, -1, jnp.int32).at[row].set(tokens, mode="drop"))
        inverses.append(jnp.where(inverse >= 0, inverse + query_pass * num_rows, -1))
        part_ids.append(part_id)
    return jnp.concatenate(orders), jnp.stack(inverses), jnp.concatenate(part_ids)


def _rank(part: Part) -> Int32[Array, " t"]:
    """Row of each member within its part."""
    if part.order is None:
        return jnp.cumsum(part.member, dtype=jnp.int32) - 1
    rank = jnp.cumsum(part.member[part.order], dtype=jnp.int32) - 1
    # An order holds each token once: so declared, XLA scatters without atomics or a sort.
    return jnp.zeros_like(rank).at[part.order].set(rank, unique_indices=True)


def _q_blocks(order: Int32[Array, " r"], row_pos: Int32[Array, " r"], blocks: Blocks) -> QBlocks:
    pos = row_pos.reshape(-1, blocks.q)
    min_pos = jnp.min(jnp.where(pos == PAD_Q_POS, jnp.iinfo(jnp.int32).max, pos), axis=1)
    return QBlocks(order=order.reshape(-1, blocks.q), min_pos=min_pos, max_pos=jnp.max(pos, axis=1))


def _runs(
    parts: Sequence[Part], part_of_block: Int32[Array, " i"], q_blocks: QBlocks
) -> tuple[BlockRuns, tuple[tuple[int, int], ...], Array]:
    """Runs of every q block, the distance intervals they name, and which q blocks see everything."""
    intervals = {(0, NO_LIMIT): 0}
    is_empty = q_blocks.max_pos < q_blocks.min_pos
    sees_everything = jnp.zeros_like(is_empty)
    start, num_blocks, interval = (jnp.zeros((len(part_of_block), 1), jnp.int32) for _ in range(3))
    merged = BlockRuns(start=start, num_blocks=num_blocks, interval=interval)
    for n, part in enumerate(parts):
        is_of_part = (part_of_block == n) & ~is_empty
        if isinstance(part.visits, Everything):
            sees_everything |= is_of_part
            continue
        columns = [
            jnp.broadcast_arrays(runs.start, runs.num_blocks, intervals.setdefault(runs.interval, len(intervals)))
            for runs in part.visits(q_blocks)
        ]
        start, num_blocks, interval = (jnp.concatenate(xs, axis=1) for xs in zip(*columns, strict=True))
        of_part = BlockRuns(start=start, num_blocks=num_blocks, interval=interval)
        merged = _select(is_of_part[:, None], of_part, merged)
    return merged, tuple(intervals), sees_everything


def _select(is_of_part: Bool[Array, "i 1"], of_part: BlockRuns, others: BlockRuns) -> BlockRuns:
    """The part's runs in its q blocks, the others' elsewhere."""
    width = max(of_part.start.shape[1], others.start.shape[1])

    def select(a: Array, b: Array) -> Array:
        a, b = (jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (a, b))
        return jnp.where(is_of_part, a, b)

    return jax.tree.map(select, of_part, others)
