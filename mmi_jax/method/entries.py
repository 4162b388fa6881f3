"""Entries: visited blocks of one head's q blocks, from runs of blocks to lists, full ones first, dead ones dropped."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmi_jax.method.block_sizes import Blocks, floor_divide
from mmi_jax.method.query_parts import QBlocks
from pallas_kernels.notation import Array

FEW = 2**21
"""Entries of all heads together, up to which a second, shorter program is not worth a branch."""

SHORT = 4
"""How many times shorter that program is: most prompts fill a small part of what their patterns may ask for."""


class RunsOfHead(NamedTuple):
    """Runs of all q blocks side by side: first kv row, number of blocks, 0 or more, interval id; int32 [i, r]."""

    start: Array
    num_blocks: Array
    interval: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entries:
    """How the visited blocks of one head are written: one word each, which names row of positions, place and interval.

    Args:
      capacity: entries that a head has room for.
      num_shared: blocks of the prompt, whose list comes before all others, for q blocks that see everything.
      num_granules: places where a block may start.
      intervals: distances that an entry may attend.
      blocks: tile sizes.
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

    def lists(self, runs: RunsOfHead, q_blocks: QBlocks, extents, variant):
        """`first`, `num_full`, `count` [i], and `start`, `interval` of all lists [num_shared + capacity].

        Args:
          runs: of this head.
          extents: least and greatest position in each block, int32 [variants, granules].
          variant: which row of `extents` each q block reads.
        """
        granule = variant[:, None] * self.num_granules + floor_divide(runs.start, self.blocks.granule)
        word = granule * len(self.intervals) + runs.interval
        low, high = (extent.reshape(-1) for extent in extents)
        args = (runs.num_blocks, word, q_blocks.lowest, q_blocks.highest, low, high)
        return tuple(x[0] for x in self._of_heads()(*(x[None] for x in args)))

    def _of_heads(self):
        """`_written` of some heads; under `jax.vmap` the mapped axis joins them: one branch is taken for all."""

        @jax.custom_batching.custom_vmap
        def run(number, *others):
            def written(length):
                return lambda: self._read(*jax.vmap(lambda *args: self._written(length, *args))(number, *others))

            if len(number) * self.capacity <= FEW:
                return written(self.capacity)()
            short = self.capacity // SHORT
            is_short = jnp.max(jnp.sum(number, axis=(1, 2), dtype=jnp.int32)) <= short
            return jax.lax.cond(is_short, written(short), written(self.capacity))

        @run.def_vmap
        def _(axis_size, is_mapped, *args):
            mapped = (
                x if m else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, m in zip(args, is_mapped, strict=True)
            )
            out = run(*(x.reshape(-1, *x.shape[2:]) for x in mapped))
            return tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in out), (True,) * len(out)

        return run

    def _written(self, length: int, number, word, q_low, q_high, kv_low, kv_high):
        """The words of one head that has at most `length` entries; of more, only the first are right."""
        entry, row, row_end = self._spelled_out(length, number, word)
        is_used = jnp.arange(length) < row_end[-1]
        entry, row = jnp.where(is_used, entry, 0), jnp.where(is_used, row, 0)
        place = entry // len(self.intervals)
        nearest = _taken(q_low, row) - _taken(kv_high, place)
        farthest = _taken(q_high, row) - _taken(kv_low, place)
        least, limit = (x[entry % len(self.intervals)] for x in jnp.asarray(self.intervals, jnp.int32).T)
        is_alive = is_used & (farthest >= jnp.maximum(least, 0)) & (nearest < limit)
        is_full = is_alive & (nearest >= jnp.maximum(least, 0)) & (farthest < limit)
        full_so_far, partial_so_far = (jnp.cumsum(x, dtype=jnp.int32) for x in (is_full, is_alive & ~is_full))
        num_full, num_partial = (_per_row(x, row_end) for x in (full_so_far, partial_so_far))
        count = num_full + num_partial
        first = self.num_shared + jnp.cumsum(count) - count
        full_base = first - (jnp.cumsum(num_full) - num_full)
        partial_base = first + num_full - (jnp.cumsum(num_partial) - num_partial)
        in_full, in_partial = _taken(full_base, row) + full_so_far, _taken(partial_base, row) + partial_so_far
        target = jnp.where(is_full, in_full, in_partial) - 1
        target = jnp.where(is_alive, target, self.num_shared + length)
        shared = jnp.arange(self.num_shared, dtype=jnp.int32) * self._words_per_block
        words = jnp.pad(shared, (0, length)).at[target].set(entry, mode="drop")
        return first, num_full, count, words

    def _read(self, first, num_full, count, words):
        """The lists, from the words of all heads: first kv row and interval id of each entry, in all the room."""
        number, room = len(self.intervals), self.num_shared + self.capacity
        words = jnp.pad(words, ((0, 0), (0, room - words.shape[1])))
        start = words // number % self.num_granules * self.blocks.granule
        return first, num_full, count, start, words % number

    def _spelled_out(self, length: int, number, word):
        """The runs block by block: word and q block of each entry [length], and where each q block's end [i]."""
        end = jnp.cumsum(number.reshape(-1), dtype=jnp.int32)
        begin, run_ids = end - number.reshape(-1), jnp.arange(number.size, dtype=jnp.int32)
        begins = jnp.where(number.reshape(-1) > 0, begin, length)
        run = jax.lax.cummax(jnp.zeros(length, jnp.int32).at[begins].max(run_ids, mode="drop"))
        entry = jnp.arange(length, dtype=jnp.int32) * self._words_per_block
        entry += _taken(word.reshape(-1) - begin * self._words_per_block, run)
        return entry, run // number.shape[1], jnp.minimum(end.reshape(number.shape)[:, -1], length)


def _per_row(so_far, row_end):
    """Entries of each row, from running totals along the list: rows that add to one counter take turns on a GPU."""
    total = jnp.where(row_end > 0, so_far[jnp.maximum(row_end - 1, 0)], 0)
    return jnp.diff(total, prepend=0)


@jax.custom_batching.custom_vmap
def _taken(x, index):
    """`x[index]`; under `jax.vmap` out of all heads side by side, for which XLA writes no pair of indices per entry."""
    return x[index]


@_taken.def_vmap
def _(axis_size, is_mapped, x, index):
    assert all(is_mapped), "numbers and places are those of each head"
    begin = jnp.arange(axis_size, dtype=jnp.int32)[:, None] * x.shape[1]
    return x.reshape(-1)[begin + jnp.clip(index, 0, x.shape[1] - 1)], True
