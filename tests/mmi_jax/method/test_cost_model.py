"""The cost model: what it expects patterns to visit, and when it runs dense instead."""

import dataclasses

import jax.numpy as jnp
import pytest
from cases import plan_of

from mmi_jax.bench.synthetic import GRID, synthetic_qkv, video_prompt
from mmi_jax.method.patterns import (
    AShape,
    BlockTopK,
    Boundary2D,
    Dense,
    Grid,
    Pattern,
    QBoundary,
    SparseTransformerFixed,
    SparseTransformerStrided,
    SwinWindow,
    TriShape,
    VerticalSlash,
)
from mmi_jax.method.tables.cost_model import HOPPER, costs_of_device, faster_patterns
from mmi_jax.method.token_groups import FramePlace
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.device import has_hopper_gpu

GRID_BY_FRAME = Grid(strides=(FramePlace(),))
PATTERNS = [
    Dense(),
    AShape(128, 1024),
    TriShape(128, 1024, 128),
    GRID_BY_FRAME,
    Grid(strides=(FramePlace(),), use_slash=True),
    VerticalSlash(256, 512),
    BlockTopK(8),
    SparseTransformerFixed(256),
    SparseTransformerStrided(256),
    SwinWindow(8, 8, 8),
    QBoundary({0: Dense(), 1: AShape(128, 1024)}),
]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)
def test_typical_blocks_are_near_what_a_plan_visits(pattern):
    """Within a factor of two: the scores of a prompt decide how far the bands of diagonals lie apart, say."""
    layout, blocks = video_prompt(8192), Blocks()
    q, k, _ = synthetic_qkv(layout, (GRID,), num_kv_heads=1, head_dim=64, dtype="float32")
    plan = plan_of(pattern, layout, q=q, k=k, blocks=blocks, scale=0.125)
    visited = float(plan.index.count.sum()) / (8192 // blocks.q)
    expected = pattern.typical_blocks(8192 // blocks.kv, blocks)
    assert expected / 2 < visited < 2 * expected, f"{visited=}, {expected=}"


def test_short_prompts_run_dense_and_long_ones_by_their_patterns():
    patterns = (GRID_BY_FRAME,) * 14 + (VerticalSlash(1000, 4096),) * 14
    by_length = {n: faster_patterns(patterns, num_tokens=n, blocks=Blocks(), costs=HOPPER) for n in (4096, 2**17)}
    assert set(by_length[4096]) == {Dense()}
    assert by_length[2**17] == patterns


def test_a_head_that_visits_nearly_everything_runs_dense_beside_sparse_ones():
    patterns = (GRID_BY_FRAME,) * 27 + (AShape(128, 40_000),)
    chosen = faster_patterns(patterns, num_tokens=2**15, blocks=Blocks(), costs=HOPPER)
    assert chosen == (GRID_BY_FRAME,) * 27 + (Dense(),)


def test_dense_is_chosen_exactly_where_the_model_says_it_is_faster():
    """Walks lengths: each choice has the smallest expected time of the two whole calls."""
    patterns = (GRID_BY_FRAME,) * 28
    for num_tokens in range(2048, 40_000, 1024):
        head = HOPPER.head(GRID_BY_FRAME, num_tokens, Blocks())
        assert head is not None
        sparse = 28 * head + HOPPER.sparse_ms + HOPPER.plan_ms
        chosen = faster_patterns(patterns, num_tokens=num_tokens, blocks=Blocks(), costs=HOPPER)
        assert (chosen == patterns) == (sparse < HOPPER.dense(28, num_tokens))


@dataclasses.dataclass(frozen=True)
class Unknown(Pattern):
    """Says nothing of what it visits."""

    def parts(self, scope):
        return Dense().parts(scope)


@pytest.mark.parametrize("pattern", [Unknown(), QBoundary({0: Unknown()}), Boundary2D({(1, 1): Unknown()})], ids=repr)
def test_a_pattern_of_unknown_cost_is_run_as_given(pattern):
    assert faster_patterns((pattern, Dense()), num_tokens=1024, blocks=Blocks(), costs=HOPPER) == (pattern, Dense())


def test_without_measurements_nothing_is_changed():
    assert faster_patterns((AShape(),), num_tokens=512, blocks=Blocks(), costs=None) == (AShape(),)


@pytest.mark.skipif(has_hopper_gpu(), reason="there is a Hopper GPU")
def test_a_cpu_has_no_cost_model():
    assert costs_of_device() is None


def test_mean_of_a_triangle():
    assert Dense().typical_blocks(7, Blocks()) == jnp.mean(jnp.arange(1, 8))
