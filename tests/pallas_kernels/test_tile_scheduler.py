"""The Hopper kernel's work: a table of q tiles, and which thread block takes which rows of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.cases import RandomLists
from pallas_kernels.attention.hopper import tile_scheduler
from pallas_kernels.attention.hopper.gpu_config import ROW_FIELDS
from pallas_kernels.attention.hopper.tile_scheduler import (
    START_BLOCKS,
    assign_round_robin,
    assign_rows,
    row_of,
    work_table,
)


def table_of(counts):
    """A work table of q tiles with lists of these lengths, and its end."""
    return jnp.zeros((len(counts) + 1, ROW_FIELDS), jnp.int32).at[:, 4].set(jnp.array([*counts, -1]))


def rows_of(assignment, num_programs, num_rows):
    """The rows that each thread block takes before it meets the end of the table."""

    def rows(program):
        span = int(assignment[0]), int(assignment[program + 1]), int(assignment[program + 2])
        taken = np.asarray(row_of(program, jnp.arange(num_rows + 1), span, num_programs, num_rows))
        return taken[: list(taken).index(num_rows)].tolist()

    return [rows(program) for program in range(num_programs)]


def test_work_table_holds_every_q_tile_once_longest_first():
    index = RandomLists(blocks_per_row=7).index(3, 4096, 256)
    table = np.asarray(work_table(jax.tree.map(jnp.asarray, index)))
    assert table[-1, 4] == -1
    heads, starts, counts = table[:-1, 0], table[:-1, 1], table[:-1, 4]
    assert sorted(zip(heads, starts, strict=True)) == [(h, t) for h in range(3) for t in range(0, 4096, 128)]
    np.testing.assert_array_equal(counts, index.count[heads, starts // 256])
    assert counts[0] == 7 and counts[-1] == 1


def test_fewer_lengths_keep_a_head_s_rows_together():
    index = jax.tree.map(jnp.asarray, RandomLists(blocks_per_row=16).index(4, 2048, 128))

    def changes_of_head(lengths_per_octave):
        heads = np.asarray(work_table(index, lengths_per_octave))[:-1, 0]
        return np.count_nonzero(np.diff(heads))

    assert changes_of_head(1) < changes_of_head(4)


def test_rows_are_assigned_as_in_the_docstring(monkeypatch):
    monkeypatch.setattr(tile_scheduler, "START_BLOCKS", 0.0)
    assignment = np.asarray(assign_rows(table_of([5, 3, 1, 1, 1, 1]), 2))
    assert assignment.tolist() == [2, 4, 4, 6]
    assert rows_of(assignment, 2, 6) == [[0, 3], [1, 2, 4, 5]]


@pytest.mark.parametrize("num_programs", [1, 5, 132])
@pytest.mark.parametrize(
    "counts",
    [
        np.r_[np.linspace(1024, 300, 50), np.full(3000, 17)],  # Grid: lines among windows
        np.arange(1000, 0, -1),  # all visited
        np.full(700, 32),
        np.r_[900, np.zeros(40)],  # one row that is more than the mean
        np.zeros(7),
        np.full(3, 1),
    ],
    ids=["lines", "all", "equal", "one", "empty", "few"],
)
def test_every_row_is_taken_once_and_no_thread_block_gets_much_more_than_the_mean(counts, num_programs):
    counts = counts.astype(int)
    assignment = np.asarray(jax.jit(assign_rows, static_argnums=1)(table_of(counts), num_programs))
    taken = rows_of(assignment, num_programs, len(counts))
    assert sorted(row for rows in taken for row in rows) == list(range(len(counts)))
    cost = counts + START_BLOCKS
    load = np.array([cost[rows].sum() for rows in taken])
    last = cost[min(assignment[0] * num_programs, len(cost) - 1) :].max()  # of those that even out
    assert load.max() <= cost.sum() / num_programs + last + 1e-3


def test_round_robin_rows_are_all_taken_once():
    taken = rows_of(np.asarray(assign_round_robin(23, 5)), 5, 23)
    assert sorted(row for rows in taken for row in rows) == list(range(23))
    assert taken[0] == [0, 9, 10, 19, 20] and taken[3] == [3, 6, 13, 16]
