"""Runs that several patterns list: whole blocks of a view, sinks, a local window; and sets of queries and ranges."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmi_jax.method.kv_views import AllKeys, KeyView
from mmi_jax.method.query_parts import Everything, GatheredRows, Part, QBlocks, Runs, Scope
from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.integers import floor_divide
from pallas_kernels.notation import Array, Bool, Int32


def blocks_between(
    view: KeyView,
    first_row: Int32[Array, " i"],
    end_row: Int32[Array, " i"],
    blocks: Blocks,
    interval: tuple[int, int] = (0, NO_LIMIT),
) -> Runs:
    """One run per q block: the whole kv blocks of `view` that hold rows `first_row` up to `end_row` (int32 [i])."""
    first = floor_divide(first_row, blocks.kv)
    num_blocks = jnp.where(end_row > first_row, -floor_divide(-end_row, blocks.kv) - first, 0)
    start = view.offset + first * blocks.kv
    return Runs(start=start[:, None], num_blocks=num_blocks[:, None], interval=interval)


def sink_and_window(view: KeyView, q_blocks: QBlocks, sink: int, local: int, blocks: Blocks) -> list[Runs]:
    """The first `sink` keys, in whole blocks, and the `local` nearest ones, exact to the token and disjoint."""
    reach = view.rank(q_blocks.max_pos + 1)
    nearest = jnp.maximum(view.rank(q_blocks.min_pos - local + 1), view.sink_rows(sink, blocks)[1])
    return [sinks(view, q_blocks, sink, blocks), blocks_between(view, nearest, reach, blocks, (0, local))]


def sinks(view: KeyView, q_blocks: QBlocks, sink: int, blocks: Blocks) -> Runs:
    """The first `sink` keys, in whole blocks."""
    first, end = view.sink_rows(sink, blocks)
    reach = view.rank(q_blocks.max_pos + 1)
    return blocks_between(view, jnp.broadcast_to(first, reach.shape), jnp.minimum(reach, end), blocks)


def all_keys(scope: Scope) -> Callable[[QBlocks], list[Runs]] | Everything:
    """What a part visits that sees every key of the set."""
    if scope.key_set == AllKeys():
        return Everything()

    def whole_view(q_blocks: QBlocks) -> list[Runs]:
        reach = scope.view.rank(q_blocks.max_pos + 1)
        return [blocks_between(scope.view, jnp.zeros_like(reach), reach, scope.blocks)]

    return whole_view


def all_keys_part(scope: Scope) -> Part:
    """The scope's members, each seeing all keys of the set."""
    return Part(member=scope.member, visits=all_keys(scope), max_blocks=scope.bound(-(-scope.num_kv_blocks // 8)))


def last_members(member: Bool[Array, " t"], num_last: int) -> Bool[Array, " t"]:
    """The last `num_last` tokens among the members."""
    return member & (jnp.cumsum(member[::-1])[::-1] <= num_last)


def ranges_without(
    start: Int32[Array, " i"], end: Int32[Array, " i"], hole_start: Int32[Array, "*i"], hole_end: Int32[Array, "*i"]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """`[start, end)` less `[hole_start, hole_end)`: two ranges, either possibly empty."""
    before = (start, jnp.minimum(end, hole_start))
    after = (jnp.maximum(start, hole_end), end)
    is_cut = hole_end > hole_start
    return jax.tree.map(lambda cut, whole: jnp.where(is_cut, cut, whole), (before, after), ((start, end), (end, end)))


def gather_rows(scope: Scope, rows: Int32[Array, " x"]) -> GatheredRows:
    """The keys in some rows of the key set's view, gathered; rows past the view's end, and empty ones, are dropped."""
    view, num_rows = scope.view, len(scope.geometry.order)
    tokens = view.order.at[rows].get(mode="fill", fill_value=-1)
    hidden = jnp.where(tokens >= 0, view.offset + rows, num_rows)
    return GatheredRows(
        tokens=jnp.pad(tokens, (0, scope.blocks.round_kv(len(rows)) - len(rows)), constant_values=-1),
        is_hidden=jnp.zeros(num_rows, bool).at[hidden].set(True, mode="drop"),
    )


def mean_up_to(limit: int | float, num_kv_blocks: int) -> float:
    """Mean over the rows of a causal triangle of `num_kv_blocks` blocks, each of which visits `limit` where it can."""
    limit = min(limit, num_kv_blocks)
    return limit - limit * (limit - 1) / (2 * num_kv_blocks)
