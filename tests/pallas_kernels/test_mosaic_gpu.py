"""The Hopper kernel: lowering for CUDA, logic and races in interpret mode on a CPU, numbers on a Hopper GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import attention_terms, reordering_error
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import block_sparse_attention
from pallas_kernels.attention import reference
from pallas_kernels.attention.cases import AllVisited, RandomLists, late_peak_inputs, mixed_inputs
from pallas_kernels.attention.hopper import gpu_tuned, mosaic_gpu, mosaic_gpu_producer
from pallas_kernels.attention.hopper.gpu_config import CONFIGS, HopperConfig, padded_head_dim
from pallas_kernels.attention.hopper.gpu_tuned import choose_config, read_table
from pallas_kernels.attention.hopper.tile_scheduler import work_table
from pallas_kernels.device import has_hopper_gpu
from pallas_kernels.hopper import SHARED_MEMORY_BYTES

SMALL = HopperConfig(tile_kv=64, num_k_stages=3, num_v_stages=2)

MIXED = {
    "d64": dict(head_dim=64),
    "d128": dict(head_dim=128),
    "d128 fp16, no extra rows, 7 query heads on one": dict(
        head_dim=128, dtype="float16", num_extra=0, num_q_heads=7, num_q_blocks=4
    ),
    "d128, kv blocks of 64": dict(head_dim=128, block_kv=64, num_q_heads=4, num_kv_heads=2),
    "d128, blocks of 256": dict(head_dim=128, block_q=256, block_kv=256, num_shared=1024, num_extra=512),
    "d96": dict(head_dim=96),
    "d128, steep": dict(head_dim=128, num_q_blocks=8, num_shared=2048, num_extra=0, steepness=200.0),
    "d256": dict(head_dim=256),
    "d256, fp16, kv blocks of 64": dict(head_dim=256, dtype="float16", block_kv=64),
}


def assert_close(got, inputs):
    """Relative error of out within two roundings of the dtype; lse within float32 noise; empty rows exact."""
    out, lse = (np.asarray(x.astype(jnp.float32)) for x in got)
    want, want_lse = (np.asarray(x.astype(jnp.float32)) for x in jax.jit(reference.attend)(inputs))
    has_keys = np.isfinite(want_lse)
    assert (out[~has_keys] == 0).all()
    assert np.isneginf(lse[~has_keys]).all()
    rounding = reordering_error(1.0, attention_terms(inputs.k.shape[1], inputs.q.shape[-1]))
    np.testing.assert_allclose(lse[has_keys], want_lse[has_keys], rtol=1e-6, atol=rounding)  # steep scores reach 2,000
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    bound = float(jnp.finfo(inputs.q.dtype).eps)  # weights and output are each rounded once: half an ulp, twice
    assert error <= bound, f"{error=} exceeds {bound=}"


def known_configs():
    """Head dim, block width and config of the built-in table and of the tuned one, if it ships."""
    built_in = [(d, tile_kv, config) for (d, tile_kv), config in CONFIGS.items()]
    tuned = read_table(gpu_tuned.PATH) if gpu_tuned.PATH.exists() else ()
    return list(dict.fromkeys(built_in + [(entry.head_dim, entry.block_kv, entry.config) for entry in tuned]))


def lowered_cases():
    """Every config at its own head dim in both dtypes, with and without extra rows; and at the head dims it pads."""
    for d, block_kv, config in known_configs():
        for dtype in ("bfloat16", "float16"):
            for num_extra in (0, 128):
                yield d, block_kv, config, dtype, num_extra
            for padded in (80, 96) if d == 128 else ():
                yield padded, block_kv, config, dtype, 128


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "block_kv", "config", "dtype", "num_extra"), [*lowered_cases()], ids=str)
def test_every_config_lowers_for_cuda(head_dim, block_kv, config, dtype, num_extra):
    inputs = mixed_inputs(head_dim=head_dim, block_kv=block_kv, num_extra=num_extra, dtype=dtype)
    run = jax.jit(functools.partial(mosaic_gpu.launch, config=config))
    assert "mosaic_gpu" in run.trace(inputs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("head_dim", "block_kv", "config"), known_configs(), ids=str)
def test_every_config_fits_shared_memory(head_dim, block_kv, config):
    assert block_kv % config.tile_kv == 0
    assert config.shared_memory_bytes(head_dim, jnp.bfloat16) <= SHARED_MEMORY_BYTES


@pytest.mark.parametrize("num_extra", [0, 128])
def test_rounded_inputs_mean_the_same_and_have_fewer_shapes(num_extra):
    inputs = mixed_inputs(head_dim=64, num_extra=num_extra)
    rounded = mosaic_gpu._rounded(inputs)
    assert rounded.k_extra.shape[1] == rounded.v_extra.shape[1] == (256 if num_extra else 0)
    assert rounded.kv_pos.shape == (16, rounded.k.shape[1] + rounded.k_extra.shape[1])
    assert rounded.index.intervals.shape[1] == 8
    entries = inputs.index.start.shape[1]
    assert entries <= rounded.index.start.shape[1] == rounded.index.interval.shape[1] <= entries * 9 / 8 + 1
    assert jax.tree.map(jnp.shape, mosaic_gpu._rounded(rounded)) == jax.tree.map(jnp.shape, rounded)
    for got, want in zip(reference.attend(rounded), reference.attend(inputs), strict=True):
        np.testing.assert_array_equal(got, want)


def test_launch_refuses_a_config_that_does_not_fit():
    with pytest.raises(NotImplementedError, match="bytes of shared memory"):
        mosaic_gpu.launch(mixed_inputs(head_dim=256), CONFIGS[128, 128])


@pytest.mark.slow
@pytest.mark.parametrize("stagger", [0, 3])
def test_interpreted_kernel_equals_reference_over_several_rounds_of_several_blocks(stagger, monkeypatch):
    monkeypatch.setattr(mosaic_gpu_producer, "STAGGERED_BLOCKS", 1)
    inputs = mixed_inputs(head_dim=64)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = mosaic_gpu.launch(inputs, dataclasses.replace(SMALL, stagger=stagger), num_programs=2, interpretable=True)
    assert_close(got, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("num_q_buffers", [1, 2])
def test_interpreted_kernel_has_no_races(num_q_buffers, capfd):
    inputs = mixed_inputs(head_dim=64, num_q_blocks=2, num_shared=256)
    config = dataclasses.replace(SMALL, num_q_buffers=num_q_buffers, num_k_stages=2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = mosaic_gpu.launch(inputs, config, num_programs=1, interpretable=True)
    assert_close(got, inputs)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("lists", [AllVisited(), RandomLists(blocks_per_row=5)])
def test_cases_never_visit_a_block_twice_nor_look_ahead(lists):
    index = lists.index(2, 2048, 128)
    for h in range(2):
        for i, (first, count) in enumerate(zip(index.first[h], index.count[h], strict=True)):
            starts = index.start[h, first : first + count]
            assert len(set(starts)) == count and starts.max() == i * 128 and starts.min() >= 0
            assert index.num_full[h, i] == count - 1


@pytest.mark.skipif(has_hopper_gpu(), reason="there is a Hopper GPU")
def test_refuses_without_a_hopper_gpu():
    with pytest.raises(NotImplementedError, match="compute capability 9"):
        mosaic_gpu.attend(mixed_inputs())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="float32"), "bfloat16 or float16"),
        (dict(head_dim=320), "at most 256"),
        (dict(block_q=64), "block_q must be a multiple of 128"),
        (dict(block_kv=32), "block_kv must be a multiple of 64"),
    ],
)
def test_check_supported_names_the_limit(change, message):
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.check_supported(mixed_inputs(**change))


def test_check_supported_needs_a_positive_scale():
    with pytest.raises(NotImplementedError, match="scale must be positive"):
        mosaic_gpu.check_supported(dataclasses.replace(mixed_inputs(), scale=-1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tile_kv=96), "64 or 128"),
        (dict(num_k_stages=1), "at least 2"),
        (dict(num_q_buffers=3), "1 or 2"),
        (dict(stagger=-1), "at least 0"),
        (dict(lengths_per_octave=0), "lengths_per_octave must be at least 1"),
    ],
)
def test_config_names_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.skipif(not has_hopper_gpu(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("sizes", MIXED.values(), ids=MIXED)
def test_kernel_equals_reference_on_the_device(sizes):
    inputs = mixed_inputs(**sizes)
    config = choose_config(padded_head_dim(inputs.q.shape[-1]), inputs.index.block_kv)
    run = jax.jit(functools.partial(mosaic_gpu.launch, config=config))
    got = run(inputs)
    assert_close(got, inputs)
    again = run(inputs)
    assert all(bool(jnp.array_equal(a, b)) for a, b in zip(got, again, strict=True))


def test_none_falls_through_to_xla_without_a_hopper_gpu():
    inputs = mixed_inputs(num_q_blocks=2, num_shared=256)
    got = block_sparse_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.index,
        q_pos=inputs.q_pos,
        kv_pos=inputs.kv_pos,
        k_extra=inputs.k_extra,
        v_extra=inputs.v_extra,
    )
    assert_close(got, inputs)


@pytest.mark.slow
def test_interpreted_kernel_repeats_rows_that_outgrow_their_first_tile(monkeypatch):
    inputs = mixed_inputs(num_q_blocks=4, num_extra=0, steepness=200.0)
    repeated = []

    def record(table, lse, find=mosaic_gpu._rows_to_repeat):
        repeated.append(int((find(table, lse)[:, 4] >= 0).sum()))
        return find(table, lse)

    monkeypatch.setattr(mosaic_gpu, "_rows_to_repeat", record)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = mosaic_gpu.launch(inputs, SMALL, num_programs=2, interpretable=True)
    assert 0 < repeated[0] < inputs.index.count.size, "some q tiles, and not all, are repeated"
    assert_close(got, inputs)


@pytest.mark.slow
def test_interpreted_kernel_repeats_rows_whose_last_tile_hides_an_overflow():
    inputs = late_peak_inputs()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = mosaic_gpu.launch(inputs, SMALL, num_programs=2, interpretable=True)
    assert_close(got, inputs)


def test_rows_to_repeat_are_those_that_say_so_and_end_the_table():
    table = work_table(jax.tree.map(jnp.asarray, RandomLists(blocks_per_row=3).index(2, 1024, 128)))
    lse = jnp.zeros((2, 1024)).at[1, 300].set(jnp.inf).at[0, 1023].set(jnp.inf).at[0, 5].set(-jnp.inf)
    again = np.asarray(mosaic_gpu._rows_to_repeat(table, lse))
    count = list(again[:, 4]).index(-1)
    assert {(row[0], row[1]) for row in again[:count]} == {(1, 256), (0, 896)}
    assert (again[count:, 4] == -1).all()
