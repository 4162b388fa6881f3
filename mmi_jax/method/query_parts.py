"""What a pattern says: parts of the queries, and the runs of kv blocks that each of their q blocks visits."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmi_jax.method.kv_views import KeyView
from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.integers import floor_divide
from pallas_kernels.notation import Array, Bool, Float, Int32
from pallas_kernels.pytree import pytree, static_field


@pytree
class QBlocks:
    """The q blocks of a head in permuted order.

    Args:
      order: token of each row, -1 for an empty row.
      lowest, highest: least and greatest position in each q block; lowest > highest where the block is empty.
    """

    order: Int32[Array, "i q"]
    lowest: Int32[Array, " i"]
    highest: Int32[Array, " i"]

    def extent(self, values: Int32[Array, " t"]):
        """Least and greatest value among the tokens of each q block; least > greatest for an empty block."""
        rows, is_row = values[jnp.maximum(self.order, 0)], self.order >= 0
        big = jnp.iinfo(jnp.int32).max
        return jnp.min(jnp.where(is_row, rows, big), axis=1), jnp.max(jnp.where(is_row, rows, -big), axis=1)

    def mean(self, x: Float[Array, "t d"]) -> Float[Array, "i d"]:
        """Mean over the tokens of each q block, float32; 0 for an empty block."""
        is_row = (self.order >= 0)[..., None]
        rows = jnp.where(is_row, x[jnp.maximum(self.order, 0)].astype(jnp.float32), 0.0)
        return rows.sum(axis=1) / jnp.maximum(is_row.sum(axis=1), 1)


@pytree
class Runs:
    """Runs of consecutive kv blocks: `r` for each q block, ascending or not, never overlapping.

    Args:
      start: first row of the run in the joint kv view, a multiple of the granule.
      num_blocks: blocks in the run; 0 or less visits nothing.
      interval: distances `lo <= q_pos - kv_pos < hi` that the run attends, in tokens.
    """

    start: Int32[Array, "i r"]
    num_blocks: Int32[Array, "i r"]
    interval: tuple[int, int] = static_field(default=(0, NO_LIMIT))


class Everything:
    """Visits every key of the prompt: one list that all such rows share."""


@pytree
class Columns:
    """Keys gathered into rows of their own, which every q block of a part visits.

    Args:
      tokens: the gathered keys, ascending, -1 for an empty row; a whole number of kv blocks.
      is_hidden: rows of the joint kv view that the part no longer sees there, because they were gathered.
    """

    tokens: Int32[Array, " x"]
    is_hidden: Bool[Array, " s"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Queries that are planned alike; each part starts on a q block of its own.

    Args:
      member: the part's tokens.
      visits: runs of each q block, asked for all q blocks and used for the part's own; or `Everything`.
      max_blocks: bound on the blocks that all q blocks of the part visit together; past it the head runs dense;
        gathered columns are not counted.
      order: token order to lay the part's rows out in; prompt order when None.
      columns: keys gathered for this part.
      view: 0 for the parts that together hold every query once, 1 and on for a further visit of the same queries.
    """

    member: Bool[Array, " t"]
    visits: Callable[[QBlocks], list[Runs]] | Everything
    max_blocks: int
    order: Int32[Array, " t"] | None = None
    view: int = 0
    columns: tuple[Columns, ...] = ()


def blocks_between(view: KeyView, first_row, end_row, blocks: Blocks, interval=(0, NO_LIMIT)) -> Runs:
    """One run per q block: the whole kv blocks of `view` that hold rows `first_row` up to `end_row` (int32 [i])."""
    first = floor_divide(first_row, blocks.kv)
    num_blocks = jnp.where(end_row > first_row, -floor_divide(-end_row, blocks.kv) - first, 0)
    start = view.offset + first * blocks.kv
    return Runs(start=start[:, None], num_blocks=num_blocks[:, None], interval=interval)


def sink_and_window(view: KeyView, q_blocks: QBlocks, sink: int, local: int, blocks: Blocks) -> list[Runs]:
    """The first `sink` keys, in whole blocks, and the `local` nearest ones, exact to the token and disjoint."""
    reach = view.rank(q_blocks.highest + 1)
    nearest = jnp.maximum(view.rank(q_blocks.lowest - local + 1), view.sink_rows(sink, blocks)[1])
    return [sinks(view, q_blocks, sink, blocks), blocks_between(view, nearest, reach, blocks, (0, local))]


def sinks(view: KeyView, q_blocks: QBlocks, sink: int, blocks: Blocks) -> Runs:
    """The first `sink` keys, in whole blocks."""
    first, end = view.sink_rows(sink, blocks)
    reach = view.rank(q_blocks.highest + 1)
    return blocks_between(view, jnp.broadcast_to(first, reach.shape), jnp.minimum(reach, end), blocks)


def last_members(member: Bool[Array, " t"], num_last: int) -> Bool[Array, " t"]:
    """The last `num_last` tokens among the members."""
    return member & (jnp.cumsum(member[::-1])[::-1] <= num_last)


def ranges_without(start, end, hole_start, hole_end):
    """`[start, end)` less `[hole_start, hole_end)`: two ranges, either possibly empty."""
    before = (start, jnp.minimum(end, hole_start))
    after = (jnp.maximum(start, hole_end), end)
    is_cut = hole_end > hole_start
    return jax.tree.map(lambda cut, whole: jnp.where(is_cut, cut, whole), (before, after), ((start, end), (end, end)))
