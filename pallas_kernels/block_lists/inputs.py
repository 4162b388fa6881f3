"""Runs of kv blocks in, block lists out: what every backend takes and returns, for one head."""

from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import AnyArray, Bool, Int32
from pallas_kernels.pytree import pytree, static_field

MIN_CAPACITY = 2**16
"""Capacity below which a head's list is bounded by nothing but all pairs of its blocks: a pattern's bound is made for
long prompts, and a list that outgrows its capacity makes the head dense. 8 bytes an entry, 512 KB a head: as much as
2,048 queries of 128 numbers in 16 bits. Chosen by hand.
"""

MAX_CAPACITY = 2**22
"""List entries of a head at most: each of a dozen passes over them would write 16 MB a head."""


@pytree
class BlockRuns:
    """Runs of consecutive kv blocks, `r` for each q block, in any order, never overlapping.

    Args:
      start: first kv row of the run, a multiple of the granule.
      num_blocks: blocks in the run; 0 or less visits nothing.
      interval: row of `intervals` that the run's blocks obey.
    """

    start: Int32[AnyArray, "i r"]
    num_blocks: Int32[AnyArray, "i r"]
    interval: Int32[AnyArray, "i r"]


@pytree
class ListInputs:
    """Runs of one head, and the positions that say which of their blocks hold a pair at all, and which only such.

    Args:
      runs: of every q block.
      q_min, q_max: smallest and largest position in each q block; `q_min > q_max` where it is empty.
      kv_pos: rows of key positions, `PAD_KV_POS` for a row that no query reaches; a whole number of granules.
      pos_row: which of `kv_pos` each q block reads.
      visits_all: q blocks that visit all shared blocks up to the diagonal, instead of runs.
      takes_over: q blocks that do so, and all others nothing, if the runs hold more than `capacity` blocks.
      intervals: distances `lo <= q_pos - kv_pos < hi` in tokens; the first excludes nothing.
      num_shared: blocks at the start of the kv rows; their list comes first, and all `visits_all` rows point to it.
      capacity: entries that the runs may need, at most.
      blocks: tile sizes.
    """

    runs: BlockRuns
    q_min: Int32[AnyArray, " i"]
    q_max: Int32[AnyArray, " i"]
    kv_pos: tuple[Int32[AnyArray, " s"], ...]
    pos_row: Int32[AnyArray, " i"]
    visits_all: Bool[AnyArray, " i"]
    takes_over: Bool[AnyArray, " i"]
    intervals: tuple[tuple[int, int], ...] = static_field(default=((0, NO_LIMIT),))
    num_shared: int = static_field()
    capacity: int = static_field()
    blocks: Blocks = static_field()


@pytree
class BlockLists:
    """Lists of one head; fields as in `BlockIndex`, without the head axis."""

    first: Int32[AnyArray, " i"]
    num_full: Int32[AnyArray, " i"]
    count: Int32[AnyArray, " i"]
    start: Int32[AnyArray, " l"]
    interval: Int32[AnyArray, " l"]
    pos_row: Int32[AnyArray, " i"]


def list_capacity(max_blocks: int, num_q_blocks: int, num_kv_blocks: int) -> int:
    """Capacity of a list: as many entries as the runs may hold, but no more than make a head worth running sparse.

    A list of three quarters of the causal blocks is no faster than dense attention.

    Args:
      max_blocks: bound on the blocks of all runs together.
    """
    worth_it = 3 * num_q_blocks * num_kv_blocks // 8
    return max(1, min(max_blocks, max(MIN_CAPACITY, min(worth_it, MAX_CAPACITY))))
