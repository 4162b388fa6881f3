"""From the parts of a pattern to what a kernel reads: row order, positions and block lists of one head.

Stages: rows -> runs -> entries (runs spelled out) -> lists (entries sorted into full and partial, dead ones dropped).
All of it is a handful of cumulative sums and scatters over flat arrays; nothing is quadratic in the prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmi_jax.blocks import Blocks
from mmi_jax.parts import Everything, Part, QBlocks
from mmi_jax.views import search
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


class _Runs(NamedTuple):
    """Runs of all q blocks side by side: first kv row, number of blocks, interval id; int32 [i, r]."""

    start: Array
    num_blocks: Array
    interval: Array


class _Entries(NamedTuple):
    """Visited blocks in row order: first kv row, interval, q block, whether there is one [l]; and row ends [i]."""

    start: Array
    interval: Array
    row: Array
    is_used: Array
    row_end: Array


def assemble(
    parts: Sequence[Part], variants: Sequence[int], q_pos: Int32[Array, " t"], kv_pos: Int32[Array, "n s"],
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
    entries, total = _entries(runs, capacity, blocks)
    extents = _block_extents(kv_pos, blocks)
    lists = _lists(entries, q_blocks, extents, jnp.asarray(intervals, jnp.int32), variant, blocks)
    everything = _everything(q_blocks, extents, num_prompt_rows, capacity, blocks)
    # A head whose lists do not fit runs dense, which is slower and never wrong.
    is_dense = total > capacity
    is_first_view = jnp.arange(len(part_of_block)) < len(part_of_block) // inverse.shape[0]
    takes_all = jnp.where(is_dense, is_first_view, sees_everything)
    rows = [jnp.where(takes_all, a, jnp.where(is_dense, 0, b)) for a, b in zip(everything, lists[:3], strict=True)]
    prompt_starts = jnp.arange(0, num_prompt_rows, blocks.kv, dtype=jnp.int32)
    return HeadPlan(
        order=order,
        inverse=inverse,
        q_pos=row_pos,
        first=rows[0],
        num_full=rows[1],
        count=rows[2],
        start=jnp.concatenate([lists[3], prompt_starts]),
        interval=jnp.concatenate([lists[4], jnp.zeros_like(prompt_starts)]),
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
        order = jnp.full(num_rows, -1, jnp.int32)
        inverse = jnp.full(num_tokens, -1, jnp.int32)
        part_id = jnp.zeros(num_rows // blocks.q, jnp.int32)
        offset = jnp.int32(0)
        for n, part in numbered:
            row = jnp.where(part.member, offset + _rank(part), num_rows)
            order = order.at[row].set(tokens, mode="drop")
            inverse = jnp.where(part.member, row + view * num_rows, inverse)
            part_id = jnp.where(jnp.arange(len(part_id)) * blocks.q >= offset, n, part_id)
            offset += -(-jnp.sum(part.member, dtype=jnp.int32) // blocks.q) * blocks.q
        orders.append(order)
        inverses.append(inverse)
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
    merged = _Runs(*(jnp.zeros((len(part_of_block), 1), jnp.int32) for _ in range(3)))
    for n, part in enumerate(parts):
        is_own = (part_of_block == n) & ~is_empty
        if isinstance(part.visits, Everything):
            sees_everything |= is_own
            continue
        own = [
            _Runs(
                *jnp.broadcast_arrays(runs.start, runs.num_blocks, intervals.setdefault(runs.interval, len(intervals)))
            )
            for runs in part.visits(q_blocks)
        ]
        merged = _select(is_own[:, None], _Runs(*map(lambda *xs: jnp.concatenate(xs, axis=1), *own)), merged)
    return merged, tuple(intervals), sees_everything


def _select(is_own, own: _Runs, others: _Runs) -> _Runs:
    """The part's runs in its own q blocks, the others' elsewhere."""
    width = max(own.start.shape[1], others.start.shape[1])
    own, others = (_Runs(*(jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in runs)) for runs in (own, others))
    return _Runs(*(jnp.where(is_own, a, b) for a, b in zip(own, others, strict=True)))


def _entries(runs: _Runs, capacity: int, blocks: Blocks) -> tuple[_Entries, Array]:
    """The runs spelled out block by block, and how many blocks there are, which may exceed `capacity`."""
    number = jnp.maximum(runs.num_blocks, 0).reshape(-1)
    end = jnp.cumsum(number, dtype=jnp.int32)
    offset, run_ids = end - number, jnp.arange(len(number), dtype=jnp.int32)
    begins = jnp.where(number > 0, offset, capacity)
    run = jax.lax.cummax(jnp.zeros(capacity, jnp.int32).at[begins].max(run_ids, mode="drop"))
    entry = jnp.arange(capacity, dtype=jnp.int32)
    start = runs.start.reshape(-1)[run] + (entry - offset[run]) * blocks.kv
    is_used = entry < end[-1]
    entries = _Entries(
        start=jnp.where(is_used, start, 0),
        interval=runs.interval.reshape(-1)[run],
        row=run // runs.start.shape[1],
        is_used=is_used,
        row_end=jnp.minimum(end.reshape(runs.start.shape)[:, -1], capacity),
    )
    return entries, end[-1]


def _block_extents(kv_pos, blocks: Blocks):
    """Least and greatest position in the kv block that starts at each granule; int32 [n, granules]."""
    granules = kv_pos.reshape(kv_pos.shape[0], -1, blocks.granule)
    window = (1, blocks.kv // blocks.granule)
    ends = ((0, 0), (0, window[1] - 1))
    lowest = jax.lax.reduce_window(granules.min(axis=2), jnp.int32(PAD_KV_POS), jax.lax.min, window, (1, 1), ends)
    highest = jax.lax.reduce_window(granules.max(axis=2), jnp.int32(-PAD_KV_POS), jax.lax.max, window, (1, 1), ends)
    return lowest, highest


def _lists(entries: _Entries, q_blocks: QBlocks, extents, intervals, variant, blocks: Blocks):
    """`first`, `num_full`, `count` [i] and `start`, `interval` [l]: full ones first, dead ones dropped."""
    row, granule = entries.row, entries.start // blocks.granule
    kv_low, kv_high = (extent[variant[row], granule] for extent in extents)
    q_low, q_high = q_blocks.lowest[row], q_blocks.highest[row]
    least, limit = intervals[entries.interval, 0], intervals[entries.interval, 1]
    nearest, farthest = q_low - kv_high, q_high - kv_low
    is_alive = entries.is_used & (farthest >= jnp.maximum(least, 0)) & (nearest < limit)
    is_full = is_alive & (nearest >= jnp.maximum(least, 0)) & (farthest < limit)
    full_so_far, partial_so_far = (jnp.cumsum(x, dtype=jnp.int32) for x in (is_full, is_alive & ~is_full))
    num_full, num_partial = (_per_row(x, entries.row_end) for x in (full_so_far, partial_so_far))
    count = num_full + num_partial
    first = jnp.cumsum(count) - count
    full_base = first - (jnp.cumsum(num_full) - num_full)
    partial_base = first + num_full - (jnp.cumsum(num_partial) - num_partial)
    place = jnp.where(is_full, full_base[row] + full_so_far - 1, partial_base[row] + partial_so_far - 1)
    place = jnp.where(is_alive, place, len(row))
    start, interval = (jnp.zeros_like(x).at[place].set(x, mode="drop") for x in (entries.start, entries.interval))
    return first, num_full, count, start, interval


def _per_row(so_far, row_end):
    """Entries of each row, from running totals along the list: rows that add to one counter take turns on a GPU."""
    total = jnp.where(row_end > 0, so_far[jnp.maximum(row_end - 1, 0)], 0)
    return jnp.diff(total, prepend=0)


def _everything(q_blocks: QBlocks, extents, num_prompt_rows: int, capacity: int, blocks: Blocks):
    """`first`, `num_full`, `count` of q blocks that visit all prompt blocks, whose shared list begins at `capacity`."""
    step = blocks.kv // blocks.granule
    lowest, highest = (extent[0, : num_prompt_rows // blocks.granule : step] for extent in extents)
    least_from_here = jax.lax.cummin(lowest, reverse=True)
    count = search(least_from_here, q_blocks.highest, side="right")
    num_full = search(jax.lax.cummax(highest), q_blocks.lowest, side="right")
    return jnp.full_like(count, capacity), jnp.minimum(num_full, count), count
