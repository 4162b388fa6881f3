"""Properties of every plan over random prompts: no pair twice, padding without effect, permutations undone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    PATTERNS,
    QUICK_TO_COMPILE,
    causal,
    mixed_prompt,
    padded_left,
    plan_of,
    video_with_timestamps,
    visit_counts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mmi_jax import (
    AShape,
    Blocks,
    BlockTopK,
    Boundary2D,
    Dense,
    Grid,
    QBoundary,
    SparseTransformerFixed,
    SparseTransformerStrided,
    SwinWindow,
    TriShape,
    VerticalSlash,
)
from mmi_jax.layout import AUDIO, concatenate, text_tokens, vision_tokens
from mmi_jax.method import patterns as registry
from mmi_jax.method.attention import attend_by_plan

BUCKET, HEADS = 112, tuple(PATTERNS.values())
bounded = settings(max_examples=25, deadline=None, derandomize=True, database=None)

size = st.integers(1, 4)
pieces = st.one_of(
    st.tuples(st.sampled_from(["text", "audio"]), st.integers(1, 12)),
    st.tuples(st.just("video"), size, size, size),
    st.tuples(st.just("timestamps"), size, size, size, size),
)
prompts = st.fixed_dictionaries(
    {
        "pieces": st.lists(pieces, min_size=1, max_size=8),
        "num_padding": st.integers(0, 20),
        "shared": st.none() | st.tuples(st.integers(0, 40), st.integers(2, 40)),
    }
)
"""Text, audio and videos of any size in any order, perhaps an image of one position, padding on both sides."""


def build(pieces, num_padding, shared):
    """The layout of such a prompt, padded to the bucket; pieces that do not fit are left out."""
    layouts = []
    for n, (kind, *sizes) in enumerate(pieces):
        match kind:
            case "text":
                piece = text_tokens(*sizes)
            case "audio":
                piece = dataclasses.replace(text_tokens(*sizes), modality=np.full(sizes[0], AUDIO, np.int32))
            case "video":
                piece = vision_tokens(*sizes, video=n)
            case _:
                piece = video_with_timestamps(*sizes[:3], timestamp=sizes[3], video=n)
        if sum(x.num_tokens for x in layouts) + piece.num_tokens <= BUCKET - num_padding:
            layouts.append(piece)
    layout = concatenate(layouts or [text_tokens(1)])
    layout = layout if shared is None else with_shared_position(layout, *shared)
    return jax.tree.map(np.asarray, padded_left(layout, num_padding).pad_to(BUCKET))


def with_shared_position(layout, start, length):
    """The layout with `length` tokens from `start` on sharing one position, as an image that attends to itself."""
    pos = np.asarray(layout.pos).copy()
    end = min(start + length, len(pos))
    if end > start:
        pos[start:end] = start
        pos[end:] -= end - start - 1
    return dataclasses.replace(layout, pos=pos)


def seeded_qk(seed):
    q, k = np.random.default_rng(seed).normal(size=(2, BUCKET, len(HEADS), 8)).astype(np.float32)
    return 2 * q, k[:, : len(HEADS) // 7]


coverage_of = jax.jit(lambda plan: plan.coverage(), compiler_options=QUICK_TO_COMPILE)


@pytest.mark.slow
@bounded
@given(prompt=prompts, seed=st.integers(0, 99))
def test_no_pair_is_visited_twice_none_from_the_future_and_each_query_sees_itself(prompt, seed):
    layout = build(**prompt)
    q, k = seeded_qk(seed)
    coverage = np.asarray(coverage_of(plan_of(HEADS, layout, q=q, k=k)))
    is_real = layout.modality >= 0
    for name, visits in zip(PATTERNS, coverage, strict=True):
        assert visits.max() <= 1, f"{name}: a pair is visited twice"
        assert not visits[~causal(layout)].any(), f"{name}: a query sees its future, or padding"
        assert visits.diagonal()[is_real].all(), f"{name}: a query does not see itself"


@bounded
@given(prompt=prompts, seed=st.integers(0, 99))
def test_permuting_and_undoing_gives_every_token_back(prompt, seed):
    layout = build(**prompt)
    q, k = seeded_qk(seed)
    order = plan_of(HEADS, layout, q=q, k=k).q_order
    x = jnp.asarray(q.transpose(1, 0, 2))
    is_real = (layout.modality >= 0)[None, :, None]
    np.testing.assert_array_equal(np.asarray(order.undo(order.apply(x))), np.where(is_real, x, 0))


@settings(bounded, max_examples=10)
@given(prompt=prompts, seed=st.integers(0, 99))
@pytest.mark.slow
def test_a_larger_bucket_changes_no_mask(prompt, seed):
    layout = build(**prompt)
    q, k = seeded_qk(seed)
    larger = BUCKET + 43
    larger_q, larger_k = (np.pad(x, ((0, larger - BUCKET), (0, 0), (0, 0)), constant_values=7) for x in (q, k))
    small = plan_of(HEADS, layout, q=q, k=k)
    large = plan_of(HEADS, layout.pad_to(larger), q=larger_q, k=larger_k)
    expected, got = np.asarray(coverage_of(small)), np.asarray(coverage_of(large))
    for name, a, b in zip(PATTERNS, expected, got, strict=True):
        np.testing.assert_array_equal(b[:BUCKET, :BUCKET], a, err_msg=name)
        assert b.sum() == a.sum(), f"{name}: padding is attended"


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_padding_may_hold_nan_and_two_runs_are_bit_equal(implementation):
    layout = padded_left(mixed_prompt(), 5)
    is_padding = np.asarray(layout.modality) < 0
    q, k = seeded_qk(0)
    attend = jax.jit(functools.partial(attend_by_plan, scale=1.0, implementation=implementation))

    def run(q, k):
        plan = plan_of(HEADS, layout, q=q, k=k)
        batched = jax.tree.map(lambda x: x[None], plan)
        return np.asarray(attend(batched, q[None], k[None], k[None])[0])[0]

    clean = run(q, k)
    spoilt = [np.where(is_padding[:, None, None], np.float32(np.nan), x) for x in (q, k)]
    for _ in range(2):
        np.testing.assert_array_equal(run(*spoilt), clean)
    assert np.isfinite(clean).all() and not clean[is_padding].any() and clean[~is_padding].any(axis=(1, 2)).all()


ALL_KEPT = {
    "a_shape": AShape(sink=0, local=200),
    "tri_shape": TriShape(sink=0, local=1, last=200),
    "vertical_slash by columns": VerticalSlash(vertical=200, slash=1, local=1),
    "vertical_slash by diagonals": VerticalSlash(vertical=1, slash=400, local=1),
    "grid": Grid(local=200),
    "grid by sinks": Grid(local=1, sink=200),
    "block_top_k": BlockTopK(num_blocks=100),
    "fixed": SparseTransformerFixed(stride=200),
    "strided": SparseTransformerStrided(stride=200),
    "swin": SwinWindow(sink=200),
    "q_boundary": QBoundary({0: AShape(sink=200, local=1), 1: BlockTopK(num_blocks=100)}),
    "boundary_2d": Boundary2D({(0, 1): VerticalSlash(vertical=200), (1, 1): AShape(local=200), (1, 0): Grid(sink=200)}),
}


@functools.cache
def visits_of_all_kept():
    return np.asarray(coverage_of(plan_of(tuple(ALL_KEPT.values()), mixed_prompt())))


@pytest.mark.parametrize("name", ALL_KEPT)
def test_a_pattern_that_keeps_everything_is_dense(name):
    np.testing.assert_array_equal(visits_of_all_kept()[list(ALL_KEPT).index(name)], causal(mixed_prompt()))


def test_density_counts_visited_tiles_against_dense_ones():
    plan = plan_of([Dense(), AShape(sink=16, local=16)], text_tokens(320))
    dense, window = np.asarray(plan.density())
    # 20 q blocks: 1 + 2 + ... + 20 tiles, and at most three each; a causal kernel computes 320 * 337 / 2 pairs.
    assert dense == pytest.approx(210 * 256 / (320 * 321 / 2 + 320 * 15 / 2))
    assert window == pytest.approx((1 + 2 + 18 * 3) * 256 / (320 * 321 / 2 + 320 * 15 / 2))
    assert np.asarray(plan.index.visited_tiles()).tolist() == [210, 57]


def test_positions_of_the_queries_survive_the_permutation():
    layout = padded_left(mixed_prompt(), 5)
    q, k = seeded_qk(0)
    plan = plan_of(HEADS, layout, q=q, k=k)
    assert (np.asarray(plan.q_pos_of_tokens()) == np.asarray(layout.pos)[None]).all()


def test_the_mask_is_where_the_coverage_is_positive():
    plan = plan_of(AShape(sink=0, local=5), text_tokens(20))
    assert (np.asarray(plan.to_mask()) == (visit_counts(plan) == 1)).all()


def test_a_pattern_plans_one_example():
    """q [t, h, d], k [s, g, d]: every head has the pattern, the mask is in prompt order."""
    q, k = np.zeros((6, 2, 8), np.float32), np.zeros((6, 1, 8), np.float32)
    tokens = Blocks(q=1, kv=1, granule=1)
    mask = AShape(sink=1, local=2).plan(jnp.asarray(q), jnp.asarray(k), text_tokens(6), blocks=tokens).to_mask()
    rows = ["100000", "110000", "111000", "101100", "100110", "100011"]
    assert mask.dtype == bool and mask.astype(int).tolist() == [[[int(x) for x in row] for row in rows]] * 2


def test_a_pattern_plans_queries_in_the_middle_of_the_keys():
    q, k = jnp.zeros((2, 1, 8)), jnp.zeros((6, 1, 8))
    plan = AShape(sink=1, local=2).plan(q, k, text_tokens(6), q_start=3, blocks=Blocks(q=1, kv=1, granule=1))
    assert plan.to_mask()[0].astype(int).tolist() == [[1, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("q", "k", "num_tokens", "message"),
    [
        ((1, 6, 2, 8), (6, 1, 8), 6, "a plan is of one example"),
        ((6, 3, 8), (6, 2, 8), 6, "num_q_heads=3 must be a positive multiple of num_kv_heads=2"),
        ((6, 2, 8), (6, 2, 4), 6, "q and k must agree in head dim"),
        ((7, 2, 8), (6, 2, 8), 6, "there are more queries than keys"),
        ((6, 2, 8), (6, 2, 8), 5, "the layout must describe every kv token"),
    ],
)
def test_a_plan_of_arrays_that_do_not_fit_is_refused(no_shape_checks, q, k, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        Dense().plan(jnp.zeros(q), jnp.zeros(k), text_tokens(num_tokens))


def test_the_table_of_cases_has_every_registered_pattern():
    assert {type(pattern) for pattern in HEADS} == set(registry.PATTERNS)
