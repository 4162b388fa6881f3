"""The bound on the time: work counted by hand for a small model, and units taken from the chip."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmi_jax import AShape, Blocks, Dense, PatternTable, VerticalSlash
from mmi_jax.aot.bundles import KernelSchedule, Region
from mmi_jax.aot.compile_ahead import Target
from mmi_jax.aot.roofline import Work, assumptions, compute_regions, cycles_per_tile, lower_bound, work_of
from mmi_jax.engine.memory.chips import CHIPS, chip_of
from mmi_jax.method.tables.pattern_table import uniform_table
from mmi_jax.sharding import make_mesh
from models.qwen2_5_vl import Qwen2_5_VL
from models.testing import TINY_CONFIG

TOKENS = 2048
FEW = Dense(), AShape(sink=128, local=128)


def target(table: PatternTable | None = None, *, devices: int = 1, num_kv_heads: int = 2) -> Target:
    model = nnx.eval_shape(lambda: Qwen2_5_VL(TINY_CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    table = table or uniform_table(Dense(), num_layers=3, num_heads=4)
    mesh = make_mesh(list(range(devices)), num_kv_heads=num_kv_heads)
    return Target(model=model, table=table, mesh=mesh, blocks=Blocks(q=256))


def test_work_of_one_device_by_hand():
    work = work_of(target(), TOKENS, density=1.0)
    weights = 3 * (16 * 32 + 32 + 2 * (16 * 16 + 16) + 32 * 16 + 2 * 16 + 3 * 16 * 24)
    assert work.matmul_flops == 2 * weights * TOKENS
    assert work.tiles == 3 * 4 * sum(2 * (n + 1) for n in range(8))  # q blocks of 256, kv blocks of 128
    assert work.link_bytes == {"weights": 0, "keys and values": 0, "heads": 0}
    assert work.hbm_bytes["weights"] == 2 * weights
    assert work.hbm_bytes["cache"] == 3 * TOKENS * 2 * (2 * 8 * 2)
    assert work.hbm_bytes["visited keys and values"] == work.tiles * 128 * (2 * 8 * 2)


def test_the_last_of_four_sequence_pieces_has_seven_sixteenths_of_the_work():
    single, four = (
        work_of(target(), TOKENS, density=1.0),
        work_of(target(devices=4, num_kv_heads=1), TOKENS, density=1.0),
    )
    tiles = [2 * (n + 1) for n in range(8)]
    assert four.tiles == 3 * 4 * sum(tiles[6:])
    assert four.matmul_flops == single.matmul_flops / 4
    assert four.link_bytes["keys and values"] == 3 * 2 * (2 * 8 * 2) * TOKENS * 3 / 4
    assert four.link_bytes["heads"] == 0


def test_the_busiest_group_of_heads_counts():
    layers = ((FEW[0], FEW[0], FEW[1], FEW[1]),) * 3
    dense, window, mixed = (
        work_of(target(table, devices=2), TOKENS, density=1.0).tiles
        for table in (None, uniform_table(FEW[1], num_layers=3, num_heads=4), PatternTable(layers=layers))
    )
    assert mixed == dense > window


def test_dynamic_patterns_visit_the_density_that_is_given():
    table = uniform_table(VerticalSlash(), num_layers=3, num_heads=4)
    assert work_of(target(table), TOKENS, density=0.1).tiles == pytest.approx(
        0.1 * work_of(target(), TOKENS, density=1.0).tiles
    )
    assert "visits 10.0% of the causal tiles" in assumptions([VerticalSlash()], 0.1)[-1]
    assert not any("chosen when the prompt is seen" in line for line in assumptions([Dense()], 0.1))


def region(first: int, bundles: int, slots: int) -> Region:
    return Region(first=first, bundles=bundles, used={"MXU": slots}, capacity={"MXU": 4}, is_loop_body=False)


def test_steps_make_a_tile():
    """512 x 1024 x 128 on units of 128 x 128 are 8,192 slots: one region of about that, or two steps of half."""
    tile = {"block_q": 512, "tile_kv": 1024}
    cycles = functools.partial(cycles_per_tile, chip=CHIPS["v5e"], tile=tile, block_kv=128, head_dim=128)
    small = region(0, 9000, 100)
    whole = KernelSchedule(kernel="k", regions=(small, region(9000, 2287, 7392), region(12000, 2301, 7854)))
    halves = KernelSchedule(kernel="k", regions=(small, region(9000, 1200, 3900)))
    assert [r.first for r in compute_regions(whole)] == [9000, 12000]
    assert cycles(whole) == 2287 / 8
    assert cycles(halves) == 2 * 1200 / 8


def test_half_filled_units_hold_half_the_products():
    """On units of 256 x 256 a head dimension of 128 leaves half of each idle: 4,096 slots for the same tile."""
    tile = {"block_q": 512, "tile_kv": 1024}
    schedule = KernelSchedule(kernel="k", regions=(region(0, 1608, 3679),))
    assert cycles_per_tile(schedule, CHIPS["v6e"], tile=tile, block_kv=128, head_dim=128) == 1608 / 8


def test_the_slowest_of_what_overlaps_is_the_bound():
    some = Work(matmul_flops=197e12, tiles=1e6, hbm_bytes={"a": 819e9, "b": 819e9}, link_bytes={"c": 200e9})
    bound = lower_bound(some, CHIPS["v5e"], cycles_per_tile=1503.0, devices_per_chip=1)
    assert bound.matmul == 1 and bound.hbm == 2 and bound.links == 1
    assert bound.attention == pytest.approx(1, rel=1e-3)
    assert bound.seconds == pytest.approx(2, rel=1e-3)
    memory_bound = dataclasses.replace(some, matmul_flops=0.0, hbm_bytes={"a": 8 * 819e9})
    assert lower_bound(memory_bound, CHIPS["v5e"], cycles_per_tile=1503.0, devices_per_chip=1).seconds == 8


def test_a_core_of_two_has_half_of_the_chip():
    some = Work(matmul_flops=1e12, tiles=1e6, hbm_bytes={"a": 1e9}, link_bytes={"c": 1e9})
    whole, half = (
        lower_bound(some, CHIPS["v4"], cycles_per_tile=100.0, devices_per_chip=n) for n in (1, 2)
    )  # as one device of two cores, and as two devices
    assert [getattr(half, f.name) / getattr(whole, f.name) for f in dataclasses.fields(whole)] == [2] * 4


def test_clocks_are_those_of_the_chips():
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in CHIPS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}


def test_figures_agree_with_what_jax_knows_of_the_chips():
    """JAX rounds differently: within 15 % (bandwidth of v5p), memory within the difference of GB and GiB."""
    from jax.experimental.pallas import tpu as pltpu

    versions = dict(v4="v4", v5e="v5e", v5p="v5p", v6e="v6e", tpu7x="7x")
    for name, version in versions.items():
        core, chip = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(version), 1), CHIPS[name]
        np.testing.assert_allclose(core.hbm_capacity_bytes * chip.cores, chip.hbm_bytes, rtol=0.02)
        np.testing.assert_allclose(core.mem_bw_bytes_per_second * chip.cores, chip.hbm_bytes_per_second, rtol=0.15)
        np.testing.assert_allclose(core.bf16_ops_per_second * chip.cores, chip.flops_per_second, rtol=0.01)
        assert core.mxu_column_size == chip.mxu_width


@pytest.mark.parametrize("topology", ["v5e", "v5e:4", "v9:2x2", "v5e:4x4x", "h100:2x2"])
def test_topologies_are_a_known_chip_and_a_shape(topology):
    with pytest.raises(ValueError, match=f"one of v4, v5e, v5p, v6e, tpu7x and its shape.*got '{topology}'"):
        chip_of(topology)
