"""A few rows times one layer of stacked weights: the meaning in float64, the Hopper kernel interpreted and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import has_hopper_gpu
from pallas_kernels.layer_matmul import layer_matmul, mosaic_gpu

LAYER = 1


def problem(rng, *, b=3, e=320, f=256, dtype="bfloat16"):
    """x, w and the layer; every other layer holds NaN."""
    w = rng.normal(size=(3, e, f))
    w[np.arange(3) != LAYER] = np.nan
    return jnp.asarray(rng.normal(size=(b, e)), dtype), jnp.asarray(w, dtype), jnp.int32(LAYER)


def assert_right(got, x, w, layer):
    """Within half an ulp of the result for its rounding, and of float32's for every sum."""
    rows, matrix = (np.asarray(a, np.float64) for a in (x, w[layer]))
    exact, sums = rows @ matrix, np.abs(rows) @ np.abs(matrix)
    allowed = float(jnp.finfo(x.dtype).eps) / 2 * np.abs(exact) + x.shape[1] * 2.0**-24 * sums
    assert got.dtype == x.dtype
    assert (np.abs(np.asarray(got, np.float64) - exact) <= allowed).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_times_one_layer(rng, dtype):
    args = problem(rng, dtype=dtype, e=30, f=20)
    assert_right(layer_matmul(*args), *args)


@pytest.mark.parametrize(
    ("sizes", "num_splits"),
    [(dict(), 1), (dict(b=64), 2), (dict(b=1, dtype="float16"), 3), (dict(b=9, e=64), 7)],
    ids=str,
)
def test_interpreted_kernel_is_right_and_has_no_races(rng, sizes, num_splits, capfd):
    args = problem(rng, **sizes)
    config = mosaic_gpu.MatmulConfig(num_stages=3)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        assert_right(mosaic_gpu.launch(*args, config, num_splits=num_splits), *args)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("b", [1, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernel_lowers_for_cuda(rng, b, dtype):
    run = functools.partial(mosaic_gpu.launch, config=mosaic_gpu.MatmulConfig())
    traced = jax.jit(run).trace(*problem(rng, b=b, dtype=dtype))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="float32"), "bfloat16 or float16, got float32"),
        (dict(b=65), "at most 64 rows, got 65"),
        (dict(e=321), "multiple of 64, got 321"),
        (dict(f=200), "multiple of 128, got 200"),
    ],
)
def test_check_supported_names_the_limit(rng, change, message):
    x, w, _ = problem(rng, **change)
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.check_supported(x, w)


@pytest.mark.usefixtures("no_shape_checks")
def test_bad_arguments_are_named(rng):
    x, w, layer = problem(rng)
    with pytest.raises(ValueError, match="must share e and dtype"):
        layer_matmul(x[:, 1:], w, layer)
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        layer_matmul(x, w, layer, implementation="cuda")  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(has_hopper_gpu(), reason="there is a Hopper GPU")
def test_the_kernel_refuses_without_a_hopper_gpu(rng):
    with pytest.raises(NotImplementedError, match="compute capability 9"):
        layer_matmul(*problem(rng), implementation="mosaic_gpu")


@pytest.mark.skipif(not has_hopper_gpu(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("sizes", [dict(), dict(b=1, e=3584, f=18944), dict(b=64, e=18944, f=3584)], ids=str)
def test_kernel_is_right_on_the_device(rng, sizes):
    args = problem(rng, **sizes)
    assert_right(layer_matmul(*args, implementation="mosaic_gpu"), *args)
