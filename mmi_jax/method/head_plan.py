"""Head plan: from the parts of a pattern to row order, positions and runs of one head, and so to its block lists."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mmi_jax.method.query_parts import Everything, Part, QBlocks
from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.block_lists.api import block_lists
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.inputs import BlockLists, BlockRuns, ListInputs, list_capacity
from pallas_kernels.notation import PAD_Q_POS, Array, Int32
from pallas_kernels.pytree import pytree, static_field


@pytree
class HeadPlan:
    """The plan of one head; fields as in `Plan`, without the head axis."""

    order: Int32[Array, " r"]
    inverse: Int32[Array, "n t"]
    q_pos: Int32[Array, " r"]
    lists: BlockLists
    intervals: tuple[tuple[int, int], ...] = static_field()


def assemble(
    parts: Sequence[Part], variants: Sequence[int], q_pos: Int32[Array, " t"], kv_pos: Sequence[Int32[Array, " s"]],
    num_prompt_rows: int, blocks: Blocks,
) -> HeadPlan:  # fmt: skip
    """The head's plan.

    Args:
      parts: parts of view 0 hold every query that is not padding exactly once.
      variants: for each part, the row of `kv_pos` it reads.
      q_pos: position of every query token.
      kv_pos: position of every row of the joint kv view, extra rows last, in each variant.
      num_prompt_rows: rows of view 0 of the keys, a whole number of kv blocks.
    """
    order, inverse, part_of_block = _rows(parts, len(q_pos), blocks)
    row_pos = jnp.where(order >= 0, q_pos[jnp.maximum(order, 0)], PAD_Q_POS)
    q_blocks = _q_blocks(order, row_pos, blocks)
    pos_row = jnp.asarray(variants, jnp.int32)[part_of_block]
    runs, intervals, sees_everything = _runs(parts, part_of_block, q_blocks)
    num_kv_blocks = num_prompt_rows // blocks.kv
    max_blocks = sum(part.max_blocks for part in parts if not isinstance(part.visits, Everything))
    lists = block_lists(
        ListInputs(
            runs=runs,
            q_min=q_blocks.lowest,
            q_max=q_blocks.highest,
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
    return HeadPlan(order=order, inverse=inverse, q_pos=row_pos, lists=lists, intervals=intervals)


def _rows(parts: Sequence[Part], num_tokens: int, blocks: Blocks):
    """Row order of all views one after another, each token's rows, and the part of each q block."""
    num_views = 1 + max(part.view for part in parts)
    per_view = [[(n, part) for n, part in enumerate(parts) if part.view == view] for view in range(num_views)]
    num_rows = blocks.round_q(num_tokens) + (max(map(len, per_view)) - 1) * blocks.q
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    orders, inverses, part_ids = [], [], []
    for view, numbered in enumerate(per_view):
        inverse = jnp.full(num_tokens, -1, jnp.int32)
        part_id = jnp.zeros(num_rows // blocks.q, jnp.int32)
        offset = jnp.int32(0)
        for n, part in numbered:
            inverse = jnp.where(part.member, offset + _rank(part), inverse)
            part_id = jnp.where(jnp.arange(len(part_id)) * blocks.q >= offset, n, part_id)
            offset += -(-jnp.sum(part.member, dtype=jnp.int32) // blocks.q) * blocks.q
        row = jnp.where(inverse >= 0, inverse, num_rows)
        orders.append(jnp.full(num_rows, -1, jnp.int32).at[row].set(tokens, mode="drop"))
        inverses.append(jnp.where(inverse >= 0, inverse + view * num_rows, -1))
        part_ids.append(part_id)
    return jnp.concatenate(orders), jnp.stack(inverses), jnp.concatenate(part_ids)


def _rank(part: Part):
    """Place of each member within its part."""
    if part.order is None:
        return jnp.cumsum(part.member, dtype=jnp.int32) - 1
    rank = jnp.cumsum(part.member[part.order], dtype=jnp.int32) - 1
    return jnp.zeros_like(rank).at[part.order].set(rank, unique_indices=True)


def _q_blocks(order, row_pos, blocks: Blocks) -> QBlocks:
    pos = row_pos.reshape(-1, blocks.q)
    lowest = jnp.min(jnp.where(pos == PAD_Q_POS, jnp.iinfo(jnp.int32).max, pos), axis=1)
    return QBlocks(order=order.reshape(-1, blocks.q), lowest=lowest, highest=jnp.max(pos, axis=1))


def _runs(parts: Sequence[Part], part_of_block, q_blocks: QBlocks):
    """Runs of every q block, the distance intervals they name, and which q blocks see everything."""
    intervals = {(0, NO_LIMIT): 0}
    is_empty = q_blocks.highest < q_blocks.lowest
    sees_everything = jnp.zeros_like(is_empty)
    start, num_blocks, interval = (jnp.zeros((len(part_of_block), 1), jnp.int32) for _ in range(3))
    merged = BlockRuns(start=start, num_blocks=num_blocks, interval=interval)
    for n, part in enumerate(parts):
        is_own = (part_of_block == n) & ~is_empty
        if isinstance(part.visits, Everything):
            sees_everything |= is_own
            continue
        own = [
            jnp.broadcast_arrays(runs.start, runs.num_blocks, intervals.setdefault(runs.interval, len(intervals)))
            for runs in part.visits(q_blocks)
        ]
        start, num_blocks, interval = (jnp.concatenate(xs, axis=1) for xs in zip(*own, strict=True))
        of_part = BlockRuns(start=start, num_blocks=num_blocks, interval=interval)
        merged = _select(is_own[:, None], of_part, merged)
    return merged, tuple(intervals), sees_everything


def _select(is_own, own: BlockRuns, others: BlockRuns) -> BlockRuns:
    """The part's runs in its own q blocks, the others' elsewhere."""
    width = max(own.start.shape[1], others.start.shape[1])

    def select(a, b):
        a, b = (jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (a, b))
        return jnp.where(is_own, a, b)

    return jax.tree.map(select, own, others)
