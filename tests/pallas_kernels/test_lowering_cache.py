"""Kernels lowered once in a process: the same text whatever was lowered before, and no second lowering."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import lowering_cache
from pallas_kernels.estimate import mosaic_gpu

SCALE = 0.125


def text(num_heads: int, copies: int = 0) -> str:
    """The lowered program of an estimate for so many heads, of `copies` of them under vmap."""
    shape = lambda *axes, dtype=jnp.int32: jax.ShapeDtypeStruct(axes, dtype)  # noqa: E731
    k, q = shape(256, 2, 64, dtype=jnp.bfloat16), shape(num_heads, 64, 64, dtype=jnp.bfloat16)
    args = k, shape(1, 256), shape(num_heads), q, shape(num_heads, 64)

    if copies:
        args = tuple(shape(copies, *arg.shape, dtype=arg.dtype) for arg in args)

    def run(*args):  # a function of its own each time: nothing is found in a cache of traces
        return lowering_cache.lowered_once(mosaic_gpu.launch, *args, scale=SCALE)

    run = jax.vmap(run) if copies else run
    return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture(autouse=True)
def _none_lowered():
    lowering_cache._exported.cache_clear()
    yield
    lowering_cache._exported.cache_clear()


def test_a_program_lowered_first_or_later_has_the_same_text():
    first = text(2)
    text(4)
    again = text(2)
    assert first.count("custom_call @mosaic_gpu") == 2 and first == again
    assert lowering_cache._exported.cache_info().misses == 2 and lowering_cache._exported.cache_info().hits == 1


def test_a_mapped_launch_holds_the_kernel_too():
    assert text(2, copies=3).count("custom_call @mosaic_gpu") == 2


def test_other_shapes_and_other_keywords_are_other_kernels():
    assert text(2) != text(4)
    before = text(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "SCALE", 0.25)
        assert text(2) != before
