"""Costs of plans that were made, and baselines brought to the same cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import plan_of

from mmi_jax import AShape, BlockTopK, Dense, Grid, VerticalSlash
from mmi_jax.engine.memory.chips import CHIPS
from mmi_jax.engine.reporting.report import PrefillReport
from mmi_jax.layout import text_tokens
from mmi_jax.method.tables.cost_model import HOPPER
from mmi_jax.method.tables.pattern_table import PatternTable
from mmi_jax.search.baselines.equal_cost import (
    PlanInputs,
    dense_tiles,
    member_at_cost,
    relative_cost,
    report_cost,
    visited_tiles,
)
from mmi_jax.search.baselines.families import FAMILIES, ladder_of, published_pattern
from mmi_jax.search.candidates import SETS, Candidates
from mmi_jax.search.costs import DENSITY, TILES, cost_models, default_costs, layer_cost
from pallas_kernels.block_lists.block_sizes import Blocks


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


SMALL = Blocks(q=16, kv=16, granule=16)


@pytest.mark.parametrize("num_tokens", [257])
def test_tiles_and_density_are_those_of_a_plan(num_tokens):
    layout = jax.tree.map(jnp.asarray, text_tokens(num_tokens))
    dense = plan_of(Dense(), layout, blocks=SMALL)
    assert dense_tiles(num_tokens, SMALL) == float(dense.index.visited_tiles()[0])
    plan = plan_of(AShape(sink=16, local=8), layout, blocks=SMALL)
    tiles = visited_tiles(np.asarray(plan.density()), num_tokens, SMALL)
    np.testing.assert_allclose(tiles, plan.index.visited_tiles(), rtol=1e-5)


def test_a_head_costs_its_tiles_and_what_its_plan_reads():
    """In milliseconds of the Hopper model, by hand, for 1,000 tiles of 128 x 128 and 1,000 tokens."""
    tiles, moved = 1000 * HOPPER.sparse_ns_per_tile, 1000 * HOPPER.move_ns
    read = 1000 * HOPPER.estimate_ns
    for pattern, expected in ((AShape(), tiles + moved), (Grid(), tiles + moved + read)):
        cost = HOPPER.head_of(pattern, 1000.0, num_tokens=1000, blocks=Blocks())
        assert cost == pytest.approx(1e-6 * expected)
    halves = HOPPER.head_of(AShape(), 2000.0, num_tokens=1000, blocks=Blocks(q=128, kv=64))
    assert halves == pytest.approx(1e-6 * (tiles + moved))


def test_a_dense_layer_is_one_dense_call_and_launches_depend_on_what_is_read():
    dense = [1.0] * 4
    assert layer_cost(HOPPER, (Dense(),) * 4, dense, 4096) == pytest.approx(HOPPER.dense(4, 4096))
    assert layer_cost(HOPPER, (AShape(),) * 4, dense, 4096) == 4 + HOPPER.sparse_ms
    two = (AShape(), Grid(), Grid(), VerticalSlash())
    assert layer_cost(HOPPER, two, dense, 4096) == 4 + HOPPER.sparse_ms + 2 * HOPPER.plan_ms


def test_every_chip_has_costs_and_a_cpu_counts_tiles():
    assert set(cost_models()) == {"hopper", "tiles", *CHIPS}
    assert default_costs() in cost_models()
    v5e, v6e = cost_models()["v5e"], cost_models()["v6e"]
    tile_ns = 4 * 128**3 / (0.91 * 197e12) * 1e9
    assert v5e.sparse_ns_per_tile == pytest.approx(tile_ns) and v6e.sparse_ns_per_tile < v5e.sparse_ns_per_tile
    assert TILES.dense(1, 128 * 10) == pytest.approx(1e-6 * 55)
    assert DENSITY.move_ns == DENSITY.estimate_ns == 0


def report(density, lengths=(1024,)) -> PrefillReport:
    table = PatternTable(layers=((AShape(), Dense()), (Dense(), Dense())))
    return PrefillReport(
        tokens={},
        lengths=lengths,
        padded_tokens=1024,
        seconds={},
        table=table,
        density=np.array(density),
        recall=np.zeros((2, 2)),
    )


def test_a_reports_cost_is_that_of_its_tiles():
    full = 36 / float(visited_tiles(1.0, 1024, Blocks()))  # the density of a dense plan of 8 x 8 blocks
    cost, dense = report_cost(report([[full / 4, full], [full, full]]), DENSITY, Blocks())
    assert dense == pytest.approx(4 * 36e-6) and cost == pytest.approx(3.25 * 36e-6)


def inputs(layout) -> PlanInputs:
    """Queries and keys of one layer, at random: two heads on one key head."""
    rng, num_tokens = np.random.default_rng(0), len(layout.modality)
    q, k = (jnp.asarray(rng.normal(size=(1, num_tokens, heads, 8)), jnp.float32) for heads in (2, 1))
    return PlanInputs(q=q, k=k, layout=jax.tree.map(lambda x: jnp.asarray(x)[None], layout))


@pytest.mark.slow
def test_a_baseline_is_brought_to_a_cost():
    layer, ladder = inputs(text_tokens(512)), [AShape(sink=16, local=n) for n in (16, 48, 96, 160, 256)]
    pattern, reached = member_at_cost(ladder, 0.4, [layer], TILES, SMALL)
    assert pattern == ladder[2], reached
    assert reached == pytest.approx(relative_cost(pattern, [layer], TILES, SMALL))
    assert member_at_cost(ladder, 0.0, [layer], TILES, SMALL)[0] == ladder[0]
    assert member_at_cost(ladder, 5.0, [layer], TILES, SMALL)[0] == ladder[-1]


@pytest.mark.parametrize("target", [0.0, 0.005, 0.123, 0.35, 0.995, 1.0, 2.0])
@pytest.mark.parametrize("expected", [0, 37, 99])
def test_the_search_reaches_the_nearest_member_from_any_start(target, expected, monkeypatch):
    """Costs of 100 members are 1 to 100 percent; the search is given its start, and tries few."""
    tried = []

    def cost(pattern, *_):
        tried.append(pattern.local)
        return pattern.local / 100

    monkeypatch.setattr("mmi_jax.search.baselines.equal_cost.relative_cost", cost)
    monkeypatch.setattr("mmi_jax.search.baselines.equal_cost._expected_member", lambda *_: expected)
    ladder = [AShape(sink=0, local=n) for n in range(1, 101)]
    pattern, reached = member_at_cost(ladder, target, [inputs(text_tokens(16))], TILES, SMALL)
    costs = np.arange(1, 101) / 100
    assert (
        abs(reached - target) == pytest.approx(np.abs(costs - target).min())
        and pattern == ladder[round(100 * reached) - 1]
    )
    assert len(tried) == len(set(tried)) <= 14


@pytest.mark.slow
def test_minference_has_a_member_at_a_cost_although_its_cost_depends_on_the_prompt():
    layer = inputs(text_tokens(2048))
    pattern, reached = member_at_cost(ladder_of("minference", 2048), 0.525, [layer], TILES, Blocks())
    assert reached == pytest.approx(0.525, rel=0.05), pattern
    assert reached == pytest.approx(relative_cost(pattern, [layer], TILES, Blocks()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_ladder_climbs_from_small_to_the_whole_prompt(name):
    ladder = ladder_of(name, 32768)
    assert len(ladder) == len(set(ladder)) > 40
    costs = [pattern.typical_blocks(256, Blocks()) or 0.0 for pattern in ladder]
    # One block more or less of a straddled boundary aside; a longer stride has fewer dilated keys.
    assert np.diff(costs).min() > -0.2
    family = FAMILIES[name]
    assert costs[-1] >= (family.make(32768 // family.unit).typical_blocks(256, Blocks()) or 0.0) > 90
    assert isinstance(published_pattern(name, 256), type(ladder[0]))


def test_candidates_are_scaled_and_dense_is_not_among_them():
    halved = Candidates(within=(Dense(), VerticalSlash(1000, 4096), AShape(128, 20), BlockTopK(5))).scaled(0.5)
    assert halved.within == (VerticalSlash(496, 2048, local=48), AShape(64, 16), BlockTopK(2))
    assert len(SETS["table4"].within) == 24 and len(SETS["all"].within) == 35
    with pytest.raises(ValueError, match="needs at least one pattern other than Dense"):
        Candidates(within=(Dense(),))
