"""The TPU kernel: numbers and races in interpret mode on a CPU, refusals, and ahead-of-time compilation."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import attention_terms, reordering_error
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sparse_attention
from pallas_kernels.attention import reference, xla
from pallas_kernels.attention.cases import mixed_inputs
from pallas_kernels.attention.tpu import mosaic_tpu, mosaic_tpu_kernel, mosaic_tpu_loads
from pallas_kernels.attention.tpu.tpu_config import MAX_INTERVALS, PIECE_ENTRIES, TpuConfig
from pallas_kernels.block_index import index_from_block_mask
from pallas_kernels.notation import PAD_KV_POS

SMALL = TpuConfig(tile_kv=256, compute_kv=128)

MIXED = {
    "d64": dict(head_dim=64),
    "d96, float32, ratio 3, steps of a part of the queries": dict(
        head_dim=96, dtype="float32", num_q_heads=6, num_kv_heads=2, num_q_blocks=2, block_q=256
    ),
    "d80, no extra rows, 7 query heads on one": dict(head_dim=80, num_extra=0, num_q_heads=7, num_q_blocks=2),
    "d256, blocks of 256": dict(head_dim=256, block_q=256, block_kv=256, num_shared=1024, num_extra=512),
}


def run(inputs, config=SMALL, interpret: bool | pltpu.InterpretParams = True):
    """The kernel, interpreted."""
    return jax.jit(functools.partial(mosaic_tpu.launch, config=config, interpret=interpret))(inputs)


def assert_close(got, inputs, lse_rtol=0.0):
    """Relative error of out within two roundings of the dtype; lse within float32 noise; empty rows exact."""
    out, lse = (np.asarray(x.astype(jnp.float32)) for x in got)
    want, want_lse = (np.asarray(x.astype(jnp.float32)) for x in jax.jit(reference.attend)(inputs))
    has_keys = np.isfinite(want_lse)
    assert (out[~has_keys] == 0).all()
    assert np.isneginf(lse[~has_keys]).all()
    rounding = reordering_error(1.0, attention_terms(inputs.k.shape[1], inputs.q.shape[-1]))
    np.testing.assert_allclose(lse[has_keys], want_lse[has_keys], rtol=lse_rtol, atol=rounding)
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    bound = max(float(jnp.finfo(inputs.q.dtype).eps), 1e-6)  # weights and output are each rounded once
    assert error <= bound, f"{error=} exceeds {bound=}"


@pytest.mark.parametrize("sizes", MIXED.values(), ids=MIXED)
def test_interpreted_kernel_equals_reference(sizes):
    inputs = mixed_inputs(**sizes)
    assert_close(run(inputs, TpuConfig(tile_kv=512, compute_kv=256, compute_q=128)), inputs)


def test_starts_are_multiples_of_16_tokens(rng):
    inputs = mixed_inputs(head_dim=128, num_shared=1280, num_extra=256, block_kv=256)
    shift = 16 * rng.integers(0, 9, inputs.index.start.shape)  # 128 of each 256 rows: no two of a row overlap
    start = (np.asarray(inputs.index.start) + shift).astype(np.int32)
    index = dataclasses.replace(inputs.index, start=jnp.asarray(start), block_kv=128)
    assert (start % 128 != 0).any()
    shifted = dataclasses.replace(inputs, index=index)
    assert_close(run(shifted), shifted)


@pytest.mark.slow
def test_lists_longer_than_the_ring_in_smem():
    """Rows of two q blocks that share one list of five pieces and three entries; it begins at the end of 128 entries.

    Blocks repeat, so a pair weighs as often as it is visited: in the kernel as in the loop of the xla backend.
    """
    inputs = mixed_inputs(num_q_heads=1, num_q_blocks=2, num_extra=0, dtype="float32")
    first, count = 2 * PIECE_ENTRIES - 2, 5 * PIECE_ENTRIES + 3
    field = lambda *row: jnp.asarray([row], jnp.int32)  # noqa: E731
    index = dataclasses.replace(
        inputs.index,
        first=field(first, first),
        num_full=field(count - 1, 0),
        count=field(count, count),
        start=jnp.asarray([128 * (np.arange(first + count) // 300 % 3)], jnp.int32),
        interval=jnp.asarray([np.arange(first + count) % 3], jnp.int32),
        pos_row=field(0, 0),
    )
    inputs = dataclasses.replace(inputs, index=index)
    out, lse = run(inputs, TpuConfig(tile_kv=1024, compute_kv=1024))
    want, want_lse = jax.jit(xla.attend)(inputs)
    rounding = count * 2.0**-24  # the sums of `count` blocks are rounded as often
    np.testing.assert_allclose(np.asarray(lse), np.asarray(want_lse), rtol=0, atol=rounding)
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    assert error <= rounding, f"{error=} exceeds {rounding=}"


LARGE_LSE_RTOL = 6 * 2.0**-24
"""Of an lse of hundreds: a score, its two factors and the sum are rounded here, a score and its factor there."""


def far_apart(**sizes):
    """Scores of the blocks between a list's first and last rise more than 100 nats above what the reference sees."""
    inputs = mixed_inputs(num_q_heads=1, num_q_blocks=2, num_shared=1024, num_extra=0, **sizes)
    is_visited = np.ones((1, 2, 8), bool)
    index = index_from_block_mask(is_visited, is_visited & (np.arange(8) < 7), block_q=128, block_kv=128)
    k = jnp.nan_to_num(inputs.k).at[:, 384:640].multiply(100.0)
    k = k.at[:, 1014:].set(jnp.nan)
    return dataclasses.replace(inputs, k=k, index=jax.tree.map(jnp.asarray, index))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scores_far_above_the_reference_are_computed_with_a_running_maximum(dtype, monkeypatch):
    inputs = far_apart(dtype=dtype)
    keys = np.asarray(inputs.k[0].astype(jnp.float32))[:1014]
    scores = np.asarray(inputs.q[0].astype(jnp.float32)) @ keys.T * inputs.scale
    sampled = np.concatenate([scores[:, :128], scores[:, 896:]], axis=1).max(axis=1)
    assert (scores.max(axis=1) > sampled + 100).any()
    assert_close(run(inputs), inputs, LARGE_LSE_RTOL)
    monkeypatch.setattr(mosaic_tpu_kernel, "_attend_online", lambda *args: None)
    assert not np.isfinite(np.asarray(run(inputs)[1])).all()


@pytest.mark.slow
def test_scores_far_below_the_reference_are_computed_with_a_running_maximum():
    """The reference sees keys that are masked for every query: their scores lie far above those that count."""
    inputs = mixed_inputs(num_q_heads=1, num_q_blocks=2, num_shared=512, num_extra=0)
    is_visited = np.ones((1, 2, 4), bool)
    index = index_from_block_mask(is_visited, is_visited & (np.arange(4) == 1), block_q=128, block_kv=128)
    k = jnp.nan_to_num(inputs.k).at[:, 384:].multiply(1000.0)
    kv_pos = inputs.kv_pos.at[:, 384:].set(PAD_KV_POS)
    inputs = dataclasses.replace(inputs, k=k, kv_pos=kv_pos, index=jax.tree.map(jnp.asarray, index))
    assert_close(run(inputs), inputs)


def races(inputs):
    """Whether the interpreter saw a race between copies and reads; and the result."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", dma_execution_mode="eager")
    got = jax.block_until_ready(run(inputs, interpret=params))
    seen = interpret_pallas_call.races
    assert seen is not None
    return seen.races_found, got


@pytest.mark.parametrize("inputs", [mixed_inputs(head_dim=64), far_apart()], ids=["mixed", "second pass"])
def test_no_races_and_nothing_uninitialised_is_read(inputs):
    found, got = races(inputs)
    assert not found
    assert_close(got, inputs, LARGE_LSE_RTOL if inputs.index.num_heads == 1 else 0.0)


def test_a_missing_wait_is_a_race(monkeypatch):
    monkeypatch.setattr(mosaic_tpu_loads, "wait_tile", lambda *args: None)
    found, _ = races(mixed_inputs(head_dim=64))
    assert found


def refusals():
    """What the kernel refuses: sizes of `mixed_inputs`, a change, and the message."""
    same = lambda inputs: inputs  # noqa: E731
    many = jnp.zeros((2, MAX_INTERVALS + 1, 2), jnp.int32)
    with_many = lambda x: dataclasses.replace(x, index=dataclasses.replace(x.index, intervals=many))  # noqa: E731
    return {
        "dtype": (dict(dtype="float16"), same, "q must be bfloat16 or float32, got float16"),
        "head_dim": (dict(head_dim=320), same, "head_dim must be at most 256, got 320"),
        "block_q": (dict(block_q=64), same, "block_q must be a multiple of 128, got 64"),
        "block_kv": (dict(block_kv=64), same, "block_kv must be a multiple of 128, got 64"),
        "tile": (dict(block_kv=512, num_shared=1024, num_extra=0), same, "block_kv must divide config.tile_kv=256"),
        "intervals": ({}, with_many, "at most 16 intervals, got 17"),
        "scale": ({}, lambda x: dataclasses.replace(x, scale=-1.0), "scale must be positive, got -1.0"),
        "VMEM": (dict(block_q=8192, num_q_blocks=1, head_dim=256), same, "needs .* bytes"),
    }


@pytest.mark.parametrize("rule", refusals())
def test_refuses_with_limit_and_value(rule):
    sizes, change, message = refusals()[rule]
    with pytest.raises(NotImplementedError, match=message):
        mosaic_tpu.launch(change(mixed_inputs(**sizes)), SMALL)


def test_refuses_where_no_tpu_is():
    inputs = mixed_inputs()
    with pytest.raises(NotImplementedError, match="mosaic_tpu needs a TPU, got jax.default_backend"):
        mosaic_tpu.attend(inputs)


def test_api_names_it():
    x = mixed_inputs()
    with pytest.raises(NotImplementedError, match="mosaic_tpu needs a TPU"):
        block_sparse_attention(
            x.q, x.k, x.v, x.index, q_pos=x.q_pos, kv_pos=x.kv_pos,
            k_extra=x.k_extra, v_extra=x.v_extra, implementation="mosaic_tpu",
        )  # fmt: skip


@pytest.mark.parametrize("sizes", [dict(compute_kv=192), dict(tile_kv=1024, compute_kv=768), dict(masked_kv=192)])
def test_config_refuses_steps_that_do_not_fit_the_tile(sizes):
    with pytest.raises(ValueError, match="_kv must be a multiple of 128 and divide self.tile_kv"):
        TpuConfig(**sizes)


COMPILE = """
import functools, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from pallas_kernels.attention.tpu import mosaic_tpu
from pallas_kernels.attention.cases import mixed_inputs

topology = topologies.get_topology_desc(sys.argv[1], platform="tpu")
place = SingleDeviceSharding(topology.devices[0])
bf16, f32 = "bfloat16", "float32"
for head_dim, dtype, block_q in ((64, bf16, 128), (128, bf16, 512), (128, bf16, 1024), (256, f32, 128)):
    sizes = dict(head_dim=head_dim, dtype=dtype, block_q=block_q, num_shared=4096, num_extra=1024)
    inputs = mixed_inputs(**sizes)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), inputs)
    config = mosaic_tpu.choose_config(inputs, topology.devices[0].device_kind)
    launch = functools.partial(mosaic_tpu.launch, config=config)
    jax.jit(launch).trace(shapes).lower(lowering_platforms=("tpu",)).compile()
    print("compiled", head_dim, dtype)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_ahead_of_time(topology):
    env = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", COMPILE, topology]
    child = subprocess.run(command, env=env, text=True, capture_output=True)
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.count("compiled") == 4
