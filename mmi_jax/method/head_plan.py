"""From the parts of a pattern to what a kernel reads: row order, positions and block lists of one head.

Stages: rows -> runs -> entries (runs spelled out) -> lists (entries sorted into full and partial, dead ones dropped);
the last two are in `entries.py`.
All of it is a handful of cumulative sums and scatters over flat arrays; nothing is quadratic in the prompt.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mmi_jax.method.block_sizes import Blocks
from mmi_jax.method.entries import Entries, RunsOfHead
from mmi_jax.method.kv_views import search
from mmi_jax.method.query_parts import Everything, Part, QBlocks
from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.notation import PAD_KV_POS, PAD_Q_POS, Array, Int32
from pallas_kernels.pytree import pytree, static_field

SMALL_INDEX = 2**16
"""Block entries of a head for which there is always room."""

LARGEST_INDEX = 2**22
"""Block entries of a head for which there is never room: each of a dozen passes over them would write 16 MB a head."""


@pytree
class HeadPlan:
    """The plan of one head; fields as in `Plan`, without the head axis."""

    order: Int32[Array, " r"]
    inverse: Int32[Array, "n t"]
    q_pos: Int32[Array, " r"]
    first: Int32[Array, " i"]
    num_full: Int32[Array, " i"]
    count: Int32[Array, " i"]
    start: Int32[Array, " l"]
    interval: Int32[Array, " l"]
    variant: Int32[Array, " i"]
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
    variant = jnp.asarray(variants, jnp.int32)[part_of_block]
    runs, intervals, sees_everything = _runs(parts, part_of_block, q_blocks)
    capacity = _capacity(parts, len(part_of_block), num_prompt_rows // blocks.kv)
    extents = _block_extents(kv_pos, blocks)
    entries = Entries(
        capacity=capacity,
        num_shared=num_prompt_rows // blocks.kv,
        num_granules=extents[0].shape[1],
        intervals=intervals,
        blocks=blocks,
    )
    *lists, start, interval = entries.lists(runs, q_blocks, extents, variant)
    # A head whose lists do not fit runs dense, which is slower and never wrong.
    is_dense = jnp.sum(runs.num_blocks, dtype=jnp.int32) > capacity
    is_first_view = jnp.arange(len(part_of_block)) < len(part_of_block) // inverse.shape[0]
    takes_all = jnp.where(is_dense, is_first_view, sees_everything)
    everything = _everything(q_blocks, extents, num_prompt_rows, blocks)
    rows = [jnp.where(takes_all, a, jnp.where(is_dense, 0, b)) for a, b in zip(everything, lists, strict=True)]
    return HeadPlan(
        order=order,
        inverse=inverse,
        q_pos=row_pos,
        first=rows[0],
        num_full=rows[1],
        count=rows[2],
        start=start,
        interval=interval,
        variant=jnp.where(takes_all, 0, variant),
        intervals=intervals,
    )


def _capacity(parts: Sequence[Part], num_q_blocks: int, num_kv_blocks: int) -> int:
    """Room for block entries: what the parts ask for, but no more than makes a head worth running sparse.

    A list of three quarters of the causal blocks is no faster than dense attention.
    """
    asked = sum(part.max_blocks for part in parts if not isinstance(part.visits, Everything))
    worth_it = 3 * num_q_blocks * num_kv_blocks // 8
    return max(1, min(asked, max(SMALL_INDEX, min(worth_it, LARGEST_INDEX))))


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
    merged = RunsOfHead(*(jnp.zeros((len(part_of_block), 1), jnp.int32) for _ in range(3)))
    for n, part in enumerate(parts):
        is_own = (part_of_block == n) & ~is_empty
        if isinstance(part.visits, Everything):
            sees_everything |= is_own
            continue
        own = [
            RunsOfHead(
                *jnp.broadcast_arrays(runs.start, runs.num_blocks, intervals.setdefault(runs.interval, len(intervals)))
            )
            for runs in part.visits(q_blocks)
        ]
        merged = _select(is_own[:, None], RunsOfHead(*map(lambda *xs: jnp.concatenate(xs, axis=1), *own)), merged)
    return merged._replace(num_blocks=jnp.maximum(merged.num_blocks, 0)), tuple(intervals), sees_everything


def _select(is_own, own: RunsOfHead, others: RunsOfHead) -> RunsOfHead:
    """The part's runs in its own q blocks, the others' elsewhere."""
    width = max(own.start.shape[1], others.start.shape[1])
    own, others = (RunsOfHead(*(jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in runs)) for runs in (own, others))
    return RunsOfHead(*(jnp.where(is_own, a, b) for a, b in zip(own, others, strict=True)))


def _block_extents(kv_pos: Sequence[Array], blocks: Blocks):
    """Least and greatest position in the kv block that starts at each granule; int32 [n, granules]."""
    window, ends = (blocks.kv // blocks.granule,), ((0, blocks.kv // blocks.granule - 1),)
    granules = [pos.reshape(-1, blocks.granule) for pos in kv_pos]
    lowest = [jax.lax.reduce_window(x.min(axis=1), PAD_KV_POS, jax.lax.min, window, (1,), ends) for x in granules]
    highest = [jax.lax.reduce_window(x.max(axis=1), -PAD_KV_POS, jax.lax.max, window, (1,), ends) for x in granules]
    return jnp.stack(lowest), jnp.stack(highest)


def _everything(q_blocks: QBlocks, extents, num_prompt_rows: int, blocks: Blocks):
    """`first`, `num_full`, `count` of q blocks that visit all prompt blocks, whose list comes before all others."""
    step = blocks.kv // blocks.granule
    lowest, highest = (extent[0, : num_prompt_rows // blocks.granule : step] for extent in extents)
    least_from_here = jax.lax.cummin(lowest, reverse=True)
    count = search(least_from_here, q_blocks.highest, side="right")
    num_full = search(jax.lax.cummax(highest), q_blocks.lowest, side="right")
    return jnp.zeros_like(count), jnp.minimum(num_full, count), count
