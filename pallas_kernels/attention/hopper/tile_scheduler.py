"""The tile scheduler of the Hopper kernel: a table of q tiles, longest lists first, assigned to thread blocks."""

import jax.numpy as jnp

from pallas_kernels.attention.hopper.gpu_config import ROW_FIELDS, TILE_Q
from pallas_kernels.attention.hopper.kernel_refs import COUNT
from pallas_kernels.block_index import BlockIndex
from pallas_kernels.notation import AnyArray, Array, Float, Int32, Scalar

START_BLOCKS = 1.5
"""The cost of a q tile over that of its blocks, in blocks: rows of 32 run at 643 TFLOP/s, long ones at 674
(H200, docs/log.md of 2026-11-26)."""


def work_table(index: BlockIndex, lengths_per_octave: int = 4) -> Int32[Array, "rows 32"]:
    """One row per 128 queries, longest lists first, then a row with count -1 that ends the table.

    Lists of nearly one length keep their order: neighbours visit the same blocks, and the heads of one kv head stay
    together, so that keys and values stay in the L2 cache.
    """
    parts = index.block_q // TILE_Q
    num_heads, num_q_blocks = index.first.shape
    head, block, part = jnp.meshgrid(jnp.arange(num_heads), jnp.arange(num_q_blocks), jnp.arange(parts), indexing="ij")

    def repeat(x: Int32[AnyArray, "h i"]) -> Int32[Array, "h i part"]:
        return jnp.broadcast_to(x[..., None], head.shape)

    last_entry = index.start.shape[1] - 1
    columns = [
        head,
        block * index.block_q + part * TILE_Q,
        jnp.clip(repeat(index.first), 0, last_entry),  # an empty row's may be anything
        repeat(index.num_full),
        repeat(index.count),
        repeat(index.pos_row),
    ]
    columns += [jnp.zeros_like(head)] * (ROW_FIELDS - len(columns))
    table = jnp.stack([c.reshape(-1).astype(jnp.int32) for c in columns], axis=1)
    # Lengths within a quarter octave count as one: sorted by the length alone, q tiles of one kv head would run at
    # different times, and L2 holds 50 MB.
    length = jnp.floor(lengths_per_octave * jnp.log2(1 + table[:, COUNT].astype(jnp.float32)))
    table = table[jnp.argsort(-length, stable=True)]
    end = jnp.zeros((1, ROW_FIELDS), jnp.int32).at[0, COUNT].set(-1)
    return jnp.concatenate([table, end])


def assign_rows(table: Int32[Array, "rows 32"], num_programs: int) -> Int32[Array, " bounds"]:
    """The assignment of the table's rows to thread blocks, so that all have equal work, within a row.

    Rows are assigned round-robin, every other round backwards, for as long as none gets more than the mean; of the rows
    that are left, the shortest, each takes a run. Six rows for two thread blocks, if a start cost nothing:

        blocks visited   5 3 1 1 1 1
        thread block     0 1 1 0 1 1        two rounds; 6 each

    Round-robin throughout, few long rows among many short ones (Grid) left the busiest of 132 thread blocks with 13 %
    too much (docs/log.md of 2026-11-26).

    Returns:
      The number of rounds; the first row of each thread block's run, which ends where the next one's begins; and the
      number of rows.
    """
    cost = table[:-1, COUNT].astype(jnp.float32) + START_BLOCKS
    num_rows = len(cost)
    rounds = jnp.pad(cost, (0, -num_rows % num_programs)).reshape(-1, num_programs)
    # Backwards every other round: the thread block with the longest row of one has the shortest of the next.
    rounds = jnp.where(jnp.arange(len(rounds))[:, None] % 2 == 0, rounds, rounds[:, ::-1])
    loads = jnp.cumsum(rounds, axis=0)
    mean = jnp.sum(cost) / num_programs
    num_rounds = jnp.sum(jnp.max(loads, axis=1) <= mean, dtype=jnp.int32)
    load = jnp.where(num_rounds > 0, loads[jnp.maximum(num_rounds - 1, 0)], 0.0)
    return _assign_runs(cost, num_rounds, jnp.cumsum(mean - load))


def _assign_runs(
    cost: Float[Array, " rows"], num_rounds: Int32[Array, ""], free: Float[Array, " programs"]
) -> Int32[Array, " bounds"]:
    """The rows past the rounds, cut where running totals of their cost reach those of what is free."""
    num_rows = len(cost)
    first = jnp.minimum(num_rounds * len(free), num_rows)
    is_left = jnp.arange(num_rows) >= first
    # All rows against all cuts is one reduction; a binary search would be a loop, and each of its steps a launch.
    middle = jnp.cumsum(jnp.where(is_left, cost, 0.0)) - cost / 2
    end = first + jnp.sum(is_left[None] & (middle[None] <= free[:-1, None]), axis=1, dtype=jnp.int32)
    return jnp.concatenate([num_rounds[None], first[None], end, jnp.full(1, num_rows, jnp.int32)])


def assign_round_robin(num_rows: int, num_programs: int) -> Int32[Array, " bounds"]:
    """The same for rows that are all assigned round-robin: there are few, and how many is not known."""
    return jnp.full(num_programs + 2, num_rows, jnp.int32).at[0].set(-(-num_rows // num_programs))


def row_of(program: Scalar, n: Scalar, span: tuple[Scalar, Scalar, Scalar], num_programs: int, num_rows: int) -> Array:
    """The n-th row of a thread block, `num_rows` past its last.

    Args:
      program: the thread block.
      n: which of its rows.
      span: of an assignment, the number of rounds, the first row of the thread block's run and its end.
      num_programs, num_rows: thread blocks, and rows of the table.
    """
    num_rounds, first, end = span
    # Arithmetic instead of a list of rows for each thread block: three scalars that stay in registers.
    in_round = n * num_programs + jnp.where(n % 2 == 0, program, num_programs - 1 - program)
    in_run = first + n - num_rounds
    row = jnp.where(n < num_rounds, in_round, jnp.where(in_run < end, in_run, num_rows))
    return jnp.minimum(row, num_rows)
