"""XLA block lists: a handful of cumulative sums and scatters over flat arrays, nothing quadratic in the prompt.

Stages: runs are expanded to entries, one int32 word each; entries whose block holds no pair are pruned; full ones and
partial ones are scattered to their places. A word names the row of positions, the granule and the interval at once.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.inputs import BlockLists, BlockRuns, ListInputs
from pallas_kernels.block_lists.integers import floor_divide, search
from pallas_kernels.notation import PAD_KV_POS, AnyArray, Array

SHORT_PROGRAM_FROM = 2**21
"""Entries of all heads together, up to which a second, shorter program is not worth a branch."""

SHORTER = 4
"""How many times shorter that program is: most prompts fill a small part of what their patterns may visit. A plan of
Q-Boundary gains 0.4 of 12.5 ms at 128K tokens (H200, docs/log.md of 2026-11-26)."""


def block_lists(inputs: ListInputs) -> BlockLists:
    """See `api.block_lists`."""
    inputs = jax.tree.map(jnp.asarray, inputs)
    runs = dataclasses.replace(inputs.runs, num_blocks=jnp.maximum(inputs.runs.num_blocks, 0))
    extents = _block_extents(inputs.kv_pos, inputs.blocks)
    writer = _ListWriter(
        capacity=inputs.capacity,
        num_shared=inputs.num_shared,
        num_granules=extents[0].shape[1],
        intervals=inputs.intervals,
        blocks=inputs.blocks,
    )
    *lists, start, interval = writer.lists(runs, inputs, extents)
    # A head whose lists do not fit runs dense, which is slower and never wrong.
    overflows = jnp.sum(runs.num_blocks, dtype=jnp.int32) > inputs.capacity
    takes_all = jnp.where(overflows, inputs.takes_over, inputs.visits_all)
    all_shared = _all_shared(inputs, extents)
    first, num_full, count = (
        jnp.where(takes_all, a, jnp.where(overflows, 0, b)) for a, b in zip(all_shared, lists, strict=True)
    )
    pos_row = jnp.where(takes_all, 0, inputs.pos_row)
    return BlockLists(first=first, num_full=num_full, count=count, start=start, interval=interval, pos_row=pos_row)


def _block_extents(kv_pos: Sequence[AnyArray], blocks: Blocks) -> tuple[Array, Array]:
    """Smallest and largest position in the kv block that starts at each granule; int32 [n, granules]."""
    window, ends = (blocks.kv // blocks.granule,), ((0, blocks.kv // blocks.granule - 1),)
    granules = [pos.reshape(-1, blocks.granule) for pos in kv_pos]
    lowest = [jax.lax.reduce_window(x.min(axis=1), PAD_KV_POS, jax.lax.min, window, (1,), ends) for x in granules]
    highest = [jax.lax.reduce_window(x.max(axis=1), -PAD_KV_POS, jax.lax.max, window, (1,), ends) for x in granules]
    return jnp.stack(lowest), jnp.stack(highest)


def _all_shared(inputs: ListInputs, extents: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """`first`, `num_full`, `count` of q blocks that visit all shared blocks, whose list comes before all others."""
    step = inputs.blocks.kv // inputs.blocks.granule
    kv_min, kv_max = (extent[0, : inputs.num_shared * step : step] for extent in extents)
    # Positions of a view need not ascend; the smallest from here on does, and so can be searched.
    min_from_here = jax.lax.cummin(kv_min, reverse=True)
    count = search(min_from_here, jnp.asarray(inputs.q_max), side="right")
    num_full = search(jax.lax.cummax(kv_max), jnp.asarray(inputs.q_min), side="right")
    return jnp.zeros_like(count), jnp.minimum(num_full, count), count


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ListWriter:
    """How the visited blocks of one head are written; fields as in `ListInputs`.

    Args:
      num_granules: places where a block may start.
    """

    capacity: int
    num_shared: int
    num_granules: int
    intervals: tuple[tuple[int, int], ...]
    blocks: Blocks

    @property
    def _words_per_block(self) -> int:
        """From a block's word to that of the next block of a run."""
        return self.blocks.kv // self.blocks.granule * len(self.intervals)

    def lists(self, runs: BlockRuns, inputs: ListInputs, extents: tuple[Array, Array]) -> tuple[Array, ...]:
        """`first`, `num_full`, `count` [i], and `start`, `interval` of all lists [num_shared + capacity]."""
        # One word an entry, so that each pass over a list moves 4 bytes and not three arrays.
        granule = inputs.pos_row[:, None] * self.num_granules + floor_divide(
            jnp.asarray(runs.start), self.blocks.granule
        )
        word = granule * len(self.intervals) + runs.interval
        kv_min, kv_max = (extent.reshape(-1) for extent in extents)
        args = (runs.num_blocks, word, inputs.q_min, inputs.q_max, kv_min, kv_max)
        return tuple(x[0] for x in self._of_heads()(*(x[None] for x in args)))

    def _of_heads(self) -> Callable[..., tuple[Array, ...]]:
        """`_written` of some heads; under `jax.vmap` the mapped axis joins them: one branch is taken for all."""

        @jax.custom_batching.custom_vmap
        def run(num_blocks: Array, *others: Array) -> tuple[Array, ...]:
            def written(length: int) -> Callable[[], tuple[Array, ...]]:
                write = jax.vmap(lambda *args: self._written(length, *args))
                return lambda: self._decoded(*write(num_blocks, *others))

            if len(num_blocks) * self.capacity <= SHORT_PROGRAM_FROM:
                return written(self.capacity)()
            short = self.capacity // SHORTER
            # One flag for all heads: `jax.vmap` makes of a branch on a mapped value a select that computes both sides.
            is_short = jnp.max(jnp.sum(num_blocks, axis=(1, 2), dtype=jnp.int32)) <= short
            return jax.lax.cond(is_short, written(short), written(self.capacity))

        @run.def_vmap
        def _(axis_size: int, is_mapped: Sequence[bool], *args: Array):
            mapped = (
                x if m else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, m in zip(args, is_mapped, strict=True)
            )
            out = run(*(x.reshape(-1, *x.shape[2:]) for x in mapped))
            return tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in out), (True,) * len(out)

        return run

    def _written(
        self, length: int, num_blocks: Array, word: Array, q_min: Array, q_max: Array, kv_min: Array, kv_max: Array
    ) -> tuple[Array, Array, Array, Array]:
        """The words of one head that has at most `length` entries; of more, only the first are right."""
        entry, row, row_end = self._expanded(length, num_blocks, word)
        is_used = jnp.arange(length) < row_end[-1]
        entry, row = jnp.where(is_used, entry, 0), jnp.where(is_used, row, 0)
        place = entry // len(self.intervals)
        min_distance = _gather(q_min, row) - _gather(kv_max, place)
        max_distance = _gather(q_max, row) - _gather(kv_min, place)
        low, high = (x[entry % len(self.intervals)] for x in jnp.asarray(self.intervals, jnp.int32).T)
        is_kept = is_used & (max_distance >= jnp.maximum(low, 0)) & (min_distance < high)
        is_full = is_kept & (min_distance >= jnp.maximum(low, 0)) & (max_distance < high)
        first, num_full, count, target = self._targets(length, row, row_end, is_kept, is_full)
        # Pruned entries have a place past the end: the scatter drops them. No two others have the same place.
        shared = jnp.arange(self.num_shared, dtype=jnp.int32) * self._words_per_block
        words = jnp.pad(shared, (0, length)).at[target].set(entry, mode="drop")
        return first, num_full, count, words

    def _expanded(self, length: int, num_blocks: Array, word: Array) -> tuple[Array, Array, Array]:
        """The runs block by block: word and q block of each entry [length], and where each q block's end [i]."""
        end = jnp.cumsum(num_blocks.reshape(-1), dtype=jnp.int32)
        begin, run_ids = end - num_blocks.reshape(-1), jnp.arange(num_blocks.size, dtype=jnp.int32)
        # Each entry's run by a scatter of run numbers to where runs begin, and a running maximum: two passes over the
        # list, where a binary search by every entry reads the runs' ends many times.
        begins = jnp.where(num_blocks.reshape(-1) > 0, begin, length)
        run = jax.lax.cummax(jnp.zeros(length, jnp.int32).at[begins].max(run_ids, mode="drop"))
        entry = jnp.arange(length, dtype=jnp.int32) * self._words_per_block
        entry += _gather(word.reshape(-1) - begin * self._words_per_block, run)
        return entry, run // num_blocks.shape[1], jnp.minimum(end.reshape(num_blocks.shape)[:, -1], length)

    def _targets(
        self, length: int, row: Array, row_end: Array, is_kept: Array, is_full: Array
    ) -> tuple[Array, Array, Array, Array]:
        """`first`, `num_full`, `count` of each q block, and where in the list each entry goes; past it if pruned."""
        # Full entries go before partial ones, both in their order: running counts say where, so that one scatter does
        # what a stable sort would.
        full_so_far, partial_so_far = (jnp.cumsum(x, dtype=jnp.int32) for x in (is_full, is_kept & ~is_full))
        num_full, num_partial = (_per_row(x, row_end) for x in (full_so_far, partial_so_far))
        count = num_full + num_partial
        first = self.num_shared + jnp.cumsum(count) - count
        full_base = first - (jnp.cumsum(num_full) - num_full)
        partial_base = first + num_full - (jnp.cumsum(num_partial) - num_partial)
        in_full, in_partial = _gather(full_base, row) + full_so_far, _gather(partial_base, row) + partial_so_far
        target = jnp.where(is_full, in_full, in_partial) - 1
        return first, num_full, count, jnp.where(is_kept, target, self.num_shared + length)

    def _decoded(self, first: Array, num_full: Array, count: Array, words: Array) -> tuple[Array, ...]:
        """The lists, from the words of all heads: first kv row and interval id of each entry, up to the capacity."""
        words = jnp.pad(words, ((0, 0), (0, self.num_shared + self.capacity - words.shape[1])))
        start = words // len(self.intervals) % self.num_granules * self.blocks.granule
        return first, num_full, count, start, words % len(self.intervals)


def _per_row(so_far: Array, row_end: Array) -> Array:
    """Entries of each row, from running totals along the list: atomic adds to one counter serialise on a GPU."""
    total = jnp.where(row_end > 0, so_far[jnp.maximum(row_end - 1, 0)], 0)
    return jnp.diff(total, prepend=0)


@jax.custom_batching.custom_vmap
def _gather(x: Array, index: Array) -> Array:
    """`x[index]`; under `jax.vmap` out of all heads side by side, for which XLA writes no pair of indices per entry."""
    return x[index]


@_gather.def_vmap
def _(axis_size: int, is_mapped: Sequence[bool], x: Array, index: Array) -> tuple[Array, bool]:
    assert all(is_mapped), "numbers and places are those of each head"
    begin = jnp.arange(axis_size, dtype=jnp.int32)[:, None] * x.shape[1]
    return x.reshape(-1)[begin + jnp.clip(index, 0, x.shape[1] - 1)], True
