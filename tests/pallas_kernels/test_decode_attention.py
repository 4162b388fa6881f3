"""Attention over a cache: the meaning in float64, the Hopper kernel interpreted and lowered, and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close_to_reference, exact_attention, plain_attention, score_ulp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode import decode_attention, mosaic_gpu
from pallas_kernels.decode.inputs import DecodeInputs
from pallas_kernels.device import has_hopper_gpu

SCALE = 0.2
LAYER = 1


def problem(
    rng, *, lengths=(100, 64, 5), num_new=3, capacity=192, new_capacity=64, num_kv_heads=2, ratio=3, head_dim=64,
    dtype="bfloat16",
) -> dict[str, Any]:  # fmt: skip
    """Arguments by name; every row that nobody may look at, and every other layer, holds NaN."""
    b = len(lengths)

    def rows(capacity, counts):
        x = rng.normal(size=(2, b, capacity, num_kv_heads, head_dim))
        x[1 - LAYER] = np.nan
        for n, count in enumerate(counts):
            x[LAYER, n, count:] = np.nan
        return jnp.asarray(x, dtype)

    return dict(
        q=jnp.asarray(rng.normal(size=(b, num_kv_heads * ratio, head_dim)), dtype),
        **{name: rows(capacity, lengths) for name in ("k", "v")},
        **{name: rows(new_capacity, [num_new] * b) for name in ("k_new", "v_new")},
        layer=jnp.int32(LAYER),
        lengths=jnp.asarray(lengths, jnp.int32),
        num_new=jnp.int32(num_new),
    )


def assert_right(got, args):
    """Every prompt against float64 over its own keys, gathered one prompt after another."""
    assert got.dtype == args["q"].dtype and got.shape == args["q"].shape
    for n, length in enumerate(args["lengths"].tolist()):
        pieces = [(args["k"], args["v"], length), (args["k_new"], args["v_new"], int(args["num_new"]))]
        k, v = (
            jnp.concatenate([place[x][LAYER, n, : place[2]] for place in pieces]).transpose(1, 0, 2) for x in (0, 1)
        )
        q = args["q"][n][:, None]
        mask = np.ones((q.shape[0], 1, k.shape[1]), bool)
        exact, plain = (f(q, k, v, mask, SCALE)[0] for f in (exact_attention, plain_attention))
        of_scores = score_ulp(q, k, mask, SCALE).max()
        assert_close_to_reference(got[n][:, None], exact, plain, dtype=got.dtype, of_scores=of_scores, what=f"{n}")


def interpreted(args, *, num_splits, num_stages=2, detect_races=False):
    config = mosaic_gpu.DecodeConfig(num_stages=num_stages, blocks_per_multiprocessor=1)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
        return mosaic_gpu.launch(inputs_of(args), config, num_splits=num_splits, interpretable=True)


def inputs_of(args) -> DecodeInputs:
    return DecodeInputs(**args, scale=SCALE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_new", [0, 3])
def test_a_token_attends_to_its_prompt_and_to_the_new_tokens(rng, dtype, num_new):
    args = problem(rng, dtype=dtype, num_new=num_new, capacity=101, new_capacity=7)
    assert_right(decode_attention(**args, scale=SCALE), args)


def test_the_default_scale_is_that_of_the_head_dim(rng):
    args = problem(rng, dtype="float32")
    np.testing.assert_array_equal(decode_attention(**args), decode_attention(**args, scale=64**-0.5))


@pytest.mark.parametrize("implementation", ["xla", "interpreted"])
def test_a_prompt_of_no_tokens_gives_zeros(rng, implementation):
    args = problem(rng, lengths=(0, 5), num_new=0)
    run = interpreted if implementation == "interpreted" else None
    got = run(args, num_splits=2) if run else decode_attention(**args, scale=SCALE, implementation="xla")
    assert (np.asarray(got[0]) == 0).all() and np.isfinite(np.asarray(got[1], np.float32)).all()


@pytest.mark.parametrize(
    ("sizes", "num_splits"),
    [
        (dict(), 1),
        (dict(num_new=64), 3),  # more thread blocks than tiles
        (dict(num_new=0, dtype="float16", head_dim=128), 2),
        (dict(lengths=(130,), ratio=64, num_kv_heads=1), 2),
        (dict(lengths=(70,), head_dim=256, num_kv_heads=1, ratio=7), 1),
    ],
    ids=str,
)
def test_interpreted_kernel_is_right(rng, sizes, num_splits):
    args = problem(rng, **sizes)
    assert_right(interpreted(args, num_splits=num_splits), args)


@pytest.mark.slow
def test_interpreted_kernel_has_no_races(rng, capfd):
    args = problem(rng, lengths=(190, 70), num_new=5)
    assert_right(interpreted(args, num_splits=2, num_stages=3, detect_races=True), args)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernel_lowers_for_cuda(rng, head_dim, dtype):
    args = problem(rng, head_dim=head_dim, dtype=dtype, ratio=7)

    def run(args):
        return mosaic_gpu.launch(inputs_of(args), mosaic_gpu.CONFIGS[head_dim])

    lowered = jax.jit(run).trace(args).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("name", ["k_new", "v"])
@pytest.mark.usefixtures("no_shape_checks")
def test_arguments_that_do_not_fit_are_refused(rng, name):
    args = problem(rng)
    with pytest.raises(ValueError, match=f"{name} must be .* got \\(2, 3, .*, 1, 64\\)"):
        decode_attention(**args | {name: args[name][:, :, :, :1]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lengths=jnp.zeros(2, jnp.int32)), r"one per prompt: expected \(3,\), got \(2,\)"),
        (dict(q=jnp.zeros((3, 5, 64), jnp.bfloat16)), "num_heads=5 must be a multiple of num_kv_heads=2"),
        (dict(v=jnp.zeros((2, 3, 64, 2, 64), jnp.bfloat16)), "keys and values must have one shape"),
        (dict(k_new=jnp.zeros((2, 3, 64, 2, 64), jnp.float32)), "keys and values must have one dtype"),
        (dict(implementation="cuda"), "implementation='cuda' is unknown"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_bad_arguments_are_named(rng, change, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**problem(rng) | change)


@pytest.mark.skipif(has_hopper_gpu(), reason="there is a Hopper GPU")
def test_the_kernel_refuses_without_a_hopper_gpu(rng):
    with pytest.raises(NotImplementedError, match="compute capability 9"):
        decode_attention(**problem(rng), implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="float32"), "all bfloat16 or all float16"),
        (dict(head_dim=80), "64, 128, 256"),
        (dict(ratio=65), "at most 64 query heads"),
        (dict(capacity=200), "multiple of 64, got 200 and 64"),
        (dict(new_capacity=16), "multiple of 64, got 192 and 16"),
    ],
)
def test_check_supported_names_the_limit(rng, change, message):
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.check_supported(inputs_of(problem(rng, **change)))


@pytest.mark.usefixtures("no_shape_checks")
def test_check_supported_refuses_what_would_overflow(rng):
    inputs = inputs_of(problem(rng))
    huge: Any = jax.ShapeDtypeStruct((2**12, 2**10, 2**10, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"below 2\*\*31"):
        mosaic_gpu.check_supported(dataclasses.replace(inputs, k=huge))


@pytest.mark.skipif(not has_hopper_gpu(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernel_is_right_on_the_device(rng, head_dim, dtype):
    longer: dict[str, Any] = dict(lengths=(4000, 1), capacity=4096, num_kv_heads=4, ratio=7, num_new=64)
    for sizes in ({}, longer):
        args = problem(rng, head_dim=head_dim, dtype=dtype, **sizes)
        assert_right(decode_attention(**args, scale=SCALE, implementation="mosaic_gpu"), args)
