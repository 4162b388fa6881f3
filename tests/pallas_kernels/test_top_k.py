"""The largest numbers by bisection against those by sorting."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.estimate.top_k import by_bits, by_groups, by_top_k, largest, largest_places, places_of

VALUES = st.sampled_from([-np.inf, -3.5, -1e-40, 0.0, 1e-40, 0.25, 1.0, 1e30, np.inf])
BY_BITS, BY_TOP_K = (jax.jit(f, static_argnames="k") for f in (by_bits, by_top_k))
BY_GROUPS = jax.jit(functools.partial(by_groups, group=3), static_argnames="k")


def test_the_first_among_equals():
    x = jnp.array([3.0, 1.0, 3.0, 2.0, 3.0])
    assert by_bits(x, 2).tolist() == [True, False, True, False, False]
    assert by_bits(x, 4).tolist() == [True, False, True, True, True]
    assert largest_places(x, 4).tolist() == [0, 2, 3, 4]


@settings(deadline=None, max_examples=60)
@given(st.lists(VALUES, min_size=12, max_size=12), st.sampled_from([1, 3, 7, 12]))
def test_bisection_finds_what_sorting_finds(numbers, k):
    x = jnp.asarray(numbers, jnp.float32)
    np.testing.assert_array_equal(BY_BITS(x, k), np.asarray(BY_TOP_K(x, k)))


@settings(deadline=None, max_examples=60)
@given(st.lists(VALUES, min_size=12, max_size=12), st.sampled_from([1, 2, 4]))
def test_groups_hold_what_sorting_finds(numbers, k):
    x = jnp.asarray(numbers, jnp.float32)
    np.testing.assert_array_equal(BY_GROUPS(x, k), np.flatnonzero(BY_TOP_K(x, k)))


def test_places_past_the_chosen_are_past_the_end():
    assert places_of(jnp.array([False, True, False, True]), 3).tolist() == [1, 3, 4]
    assert places_of(jnp.array([True, True, False, True]), 2).tolist() == [0, 1]


def test_a_million_numbers(rng):
    x = jnp.asarray(rng.integers(0, 300, 2**20), jnp.float32)  # every number stands for thousands
    places, small = (jax.jit(largest_places, static_argnums=1)(x[:n], 1000) for n in (2**20, 2**10))
    np.testing.assert_array_equal(places, np.argsort(-np.asarray(x), stable=True)[:1000])
    np.testing.assert_array_equal(small, np.sort(np.argsort(-np.asarray(x[: 2**10]), stable=True)[:1000]))


@pytest.mark.parametrize("k", [1, 1000, 65_535, 65_536])
def test_many_numbers_at_once(rng, k):
    x = jnp.asarray(rng.normal(size=(3, 65_536)), jnp.float32)
    by_four_bits = functools.partial(by_bits, bits_at_once=4)
    got, fast, want = (jax.jit(jax.vmap(lambda x, f=f: f(x, k)))(x) for f in (by_bits, by_four_bits, by_top_k))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(fast, want)
    assert np.asarray(got).sum(axis=1).tolist() == [k] * 3


def test_this_platform_sorts():
    text = jax.jit(lambda x: largest(x, 5)).lower(jnp.zeros(64)).as_text()
    assert "top_k" in text and "while" not in text


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from pallas_kernels.estimate.top_k import by_top_k, largest

device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
x = jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=SingleDeviceSharding(device))
for f in (by_top_k, largest):
    program = jax.jit(lambda x, f=f: f(x, 1000)).trace(x).lower(lowering_platforms=("tpu",)).compile().as_text()
    print(f.__name__, "sorts" if " sort(" in program or "TopK" in program else "does not sort")
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_no_sort_when_compiled_ahead_of_time_for_a_tpu():
    env = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    child = subprocess.run([sys.executable, "-c", COMPILE], env=env, text=True, capture_output=True)
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.splitlines() == ["by_top_k sorts", "largest does not sort"]
