"""block_lists: the reference against a matrix written by hand, XLA against the reference, and every refusal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import BlockIndex, coverage
from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.block_lists import xla
from pallas_kernels.block_lists.api import block_lists
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.inputs import MAX_CAPACITY, MIN_CAPACITY, BlockRuns, ListInputs, list_capacity
from pallas_kernels.block_lists.integers import floor_divide
from pallas_kernels.notation import PAD_KV_POS

ALL, WINDOW = (0, NO_LIMIT), (0, 2)
PAIRS = Blocks(q=2, kv=2, granule=1)


def inputs_of(
    runs, q_pos, *kv_pos, intervals=(ALL, WINDOW), blocks=PAIRS, capacity=100, num_shared=None, pos_row=None,
    visits_all=(), takes_over=None,
) -> ListInputs:  # fmt: skip
    """Inputs from lists: runs are `(start, num_blocks, interval)` by q block, positions by row, -1 for an empty row."""
    width = max(map(len, runs))
    table = np.array([[*row, *[(0, 0, 0)] * (width - len(row))] for row in runs], np.int32)
    rows = np.array(q_pos, np.int32).reshape(-1, blocks.q)
    ids = np.arange(len(runs))
    return ListInputs(
        runs=BlockRuns(start=table[..., 0], num_blocks=table[..., 1], interval=table[..., 2]),
        q_min=np.where(rows >= 0, rows, NO_LIMIT).min(axis=1).astype(np.int32),
        q_max=rows.max(axis=1),
        kv_pos=tuple(np.array(pos, np.int32) for pos in kv_pos),
        pos_row=np.zeros(len(runs), np.int32) if pos_row is None else np.array(pos_row, np.int32),
        visits_all=np.isin(ids, visits_all),
        takes_over=np.ones(len(runs), bool) if takes_over is None else np.isin(ids, takes_over),
        intervals=intervals,
        num_shared=len(kv_pos[0]) // blocks.kv if num_shared is None else num_shared,
        capacity=capacity,
        blocks=blocks,
    )


EXAMPLE = inputs_of([[(0, 2, 1)], [(0, 2, 1)], [(2, 2, 1), (0, 1, 0)]], range(6), range(6))
"""The example in the docstring of `block_lists`."""


def owned(lists):
    """Each q block's entries, full ones and partial ones apart, and its row of positions."""
    entries = list(zip(np.asarray(lists.start).tolist(), np.asarray(lists.interval).tolist(), strict=True))
    rows = zip(
        *(np.asarray(x).tolist() for x in (lists.first, lists.num_full, lists.count, lists.pos_row)), strict=True
    )
    return [(entries[a : a + full], entries[a + full : a + count], pos_row) for a, full, count, pos_row in rows]


def test_the_docstrings_example():
    lists = block_lists(EXAMPLE, implementation="reference")
    assert lists.start[:9].tolist() == [0, 2, 4, 0, 0, 2, 0, 2, 4]
    assert lists.interval[:9].tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 1]
    assert [lists.first.tolist(), lists.num_full.tolist(), lists.count.tolist()] == [[3, 4, 6], [0, 0, 1], [1, 2, 3]]
    fields = {f.name: np.asarray(getattr(lists, f.name))[None] for f in dataclasses.fields(lists)}
    intervals = np.array([EXAMPLE.intervals], np.int32)
    index = BlockIndex(**fields, intervals=intervals, block_q=2, block_kv=2)
    pos = jnp.arange(6, dtype=jnp.int32)[None]
    rows = ["".join(map(str, row)) for row in np.asarray(coverage(index, pos, pos))[0].tolist()]
    assert rows == ["100000", "110000", "011000", "001100", "110110", "110011"]


EMPTY = PAD_KV_POS
CASES = {
    # name: inputs, and what the rows own: full entries, partial entries, row of positions
    "example": (
        EXAMPLE,
        [([], [(0, 1)], 0), ([], [(0, 1), (2, 1)], 0), ([(0, 0)], [(2, 1), (4, 1)], 0)],
    ),
    "runs without blocks, an empty q block": (
        inputs_of([[(0, 0, 0)], [(0, -3, 0)], [(0, 2, 0)]], [0, 1, 2, 3, -1, -1], range(4)),
        [([], [], 0), ([], [], 0), ([], [], 0)],
    ),
    "empty kv rows are never full, a block of them is pruned": (
        inputs_of([[(0, 3, 0)]], [7, 8], [0, 1, 2, EMPTY, EMPTY, EMPTY]),
        [([(0, 0)], [(2, 0)], 0)],
    ),
    "a block may start at any granule": (
        inputs_of([[(1, 1, 0), (3, 1, 0)]], [5, 6], range(6)),
        [([(1, 0), (3, 0)], [], 0)],
    ),
    "an interval that excludes near keys": (
        inputs_of([[(0, 3, 1)]], [4, 5], range(6), intervals=(ALL, (2, NO_LIMIT))),
        [([(0, 1)], [(2, 1)], 0)],
    ),
    "rows of positions of their own": (
        inputs_of([[(0, 1, 0)], [(0, 1, 0)]], [4, 5, 4, 5], range(4), [EMPTY, 0, 1, 2], pos_row=[0, 1]),
        [([(0, 0)], [], 0), ([], [(0, 0)], 1)],
    ),
    "a row that visits all points to the shared list up to the diagonal": (
        inputs_of([[(0, 1, 0)], [(0, 0, 0)]], [4, 5, 2, 3], range(6), visits_all=[1], pos_row=[0, 0]),
        [([(0, 0)], [], 0), ([(0, 0)], [(2, 0)], 0)],
    ),
    "of unordered keys the shared list ends at the last block that is reached": (
        inputs_of([[(0, 0, 0)]], [1, 2], [0, 9, 9, 9, 1, 9], visits_all=[0]),
        [([], [(0, 0), (2, 0), (4, 0)], 0)],
    ),
    "lists that just fit": (
        inputs_of([[(0, 1, 0)], [(0, 2, 0)]], range(4), range(4), capacity=3),
        [([], [(0, 0)], 0), ([(0, 0)], [(2, 0)], 0)],
    ),
    "lists that do not fit: some rows take over, others visit nothing": (
        inputs_of([[(0, 1, 0)], [(0, 2, 0)]], [2, 3, 0, 1], range(4), capacity=2, takes_over=[0], pos_row=[0, 0]),
        [([(0, 0)], [(2, 0)], 0), ([], [], 0)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_what_each_row_owns(name, implementation):
    inputs, expected = CASES[name]
    assert owned(block_lists(inputs, implementation=implementation)) == expected


BLOCKS = Blocks(q=2, kv=4, granule=2)
NUM_ROWS, NUM_Q_BLOCKS, WIDTH = 24, 5, 3
positions = st.lists(st.integers(0, 30) | st.just(EMPTY), min_size=NUM_ROWS, max_size=NUM_ROWS)
run = st.tuples(st.integers(0, 10).map(lambda n: 2 * n), st.integers(-1, 5), st.integers(0, 2)).map(
    lambda r: (r[0], min(r[1], (NUM_ROWS - r[0]) // BLOCKS.kv), r[2])
)
random_inputs = st.fixed_dictionaries(
    {
        "runs": st.lists(st.lists(run, min_size=WIDTH, max_size=WIDTH), min_size=NUM_Q_BLOCKS, max_size=NUM_Q_BLOCKS),
        "q_pos": st.lists(st.integers(-1, 30), min_size=2 * NUM_Q_BLOCKS, max_size=2 * NUM_Q_BLOCKS),
        "kv_pos": st.tuples(positions, positions),
        "capacity": st.sampled_from([8, 40]),
        "visits_all": st.lists(st.integers(0, NUM_Q_BLOCKS - 1)),
        "takes_over": st.lists(st.integers(0, NUM_Q_BLOCKS - 1)),
        "pos_row": st.lists(st.integers(0, 1), min_size=NUM_Q_BLOCKS, max_size=NUM_Q_BLOCKS),
    }
)
compiled = jax.jit(xla.block_lists)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(drawn=random_inputs)
def test_xla_equals_the_reference(drawn):
    intervals = (ALL, (0, 7), (5, NO_LIMIT))
    runs, q_pos, kv_pos, sizes = drawn.pop("runs"), drawn.pop("q_pos"), drawn.pop("kv_pos"), drawn
    inputs = inputs_of(runs, q_pos, *kv_pos, intervals=intervals, blocks=BLOCKS, num_shared=4, **sizes)
    assert owned(compiled(inputs)) == owned(block_lists(inputs, implementation="reference"))


@pytest.mark.parametrize("short_program_from", [0, xla.SHORT_PROGRAM_FROM])
@pytest.mark.parametrize("capacity", [8, 20, 21])
def test_heads_joined_by_vmap_equal_the_reference_one_by_one(short_program_from, capacity, monkeypatch):
    """Five blocks of one head, two of the other: the short program holds a quarter of the capacity."""
    monkeypatch.setattr(xla, "SHORT_PROGRAM_FROM", short_program_from)
    heads = [
        inputs_of([[(0, 1, 0)], [(0, 2, 0)], [(2, 2, 1)]], range(6), range(6), capacity=capacity),
        inputs_of([[(0, 0, 0)], [(0, 1, 0)], [(0, 1, 1)]], range(6), range(6), capacity=capacity),
    ]
    joined = jax.vmap(block_lists)(jax.tree.map(lambda *xs: jnp.stack(xs), *heads))
    for n, head in enumerate(heads):
        got = jax.tree.map(lambda x, n=n: x[n], joined)
        assert owned(got) == owned(block_lists(head, implementation="reference"))


def test_capacity_is_bounded_by_what_is_worth_it_and_by_memory():
    assert list_capacity(0, 8, 8) == 1
    assert list_capacity(100, 8, 8) == 100, "small lists are never cut"
    assert list_capacity(10**9, 8, 8) == MIN_CAPACITY
    assert list_capacity(10**9, 1024, 1024) == 3 * 2**20 // 8
    assert list_capacity(10**9, 8192, 8192) == MAX_CAPACITY


WRONG = {
    "rows of kv_pos must have one length": {"kv_pos": (np.zeros(6, np.int32), np.zeros(4, np.int32))},
    "num_shared=4 blocks must lie among the 6 kv rows": {"num_shared": 4},
    "the first interval must exclude nothing": {"intervals": (WINDOW,)},
    "capacity must be at least one entry, got inputs.capacity=0": {"capacity": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_sizes_that_do_not_fit_are_refused(no_shape_checks, message):
    with pytest.raises(ValueError, match=message):
        block_lists(dataclasses.replace(EXAMPLE, **WRONG[message]))


def test_the_reference_refuses_traced_arrays():
    with pytest.raises(NotImplementedError, match="expected concrete arrays"):
        jax.jit(lambda x: block_lists(x, implementation="reference"))(EXAMPLE)


@pytest.mark.parametrize("divisor", [1, 8, 12])
def test_divisions_round_down_on_both_sides_of_zero(divisor):
    numbers = np.array([-(2**31), -25, -24, -1, 0, 1, 24, 25, 2**31 - 1], np.int32)
    np.testing.assert_array_equal(floor_divide(jnp.asarray(numbers), divisor), np.floor_divide(numbers, divisor))
