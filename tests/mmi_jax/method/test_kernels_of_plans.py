"""Plans through the kernels of chips that are not here: interpreted on a CPU, and compiled for TPUs ahead of time."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PATTERNS
from closeness import assert_same_up_to_order, attention_terms, reordering_error
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmi_jax.layout import concatenate, text_tokens, vision_tokens
from mmi_jax.method.attention import permute
from mmi_jax.method.plan import batch_geometry, plan_batch
from pallas_kernels.attention import reference
from pallas_kernels.attention.hopper import mosaic_gpu
from pallas_kernels.attention.hopper.gpu_config import HopperConfig
from pallas_kernels.attention.tpu import mosaic_tpu
from pallas_kernels.attention.tpu.tpu_config import TpuConfig
from pallas_kernels.block_lists.block_sizes import Blocks

PROMPT = concatenate(
    [text_tokens(19), vision_tokens(24, 3, 5), text_tokens(20), vision_tokens(3, 4, 6), text_tokens(9)]
)
"""480 tokens: four q blocks and parts of them."""


@functools.cache
def inputs(names: tuple[str, ...], num_kv_heads: int, dtype: str):
    """What a kernel reads of one plan in which each pattern is a head."""
    patterns, blocks, t = tuple(PATTERNS[name] for name in names), Blocks(), PROMPT.num_tokens
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, t, num_heads, 64)), dtype)
        for num_heads in (len(names), num_kv_heads, num_kv_heads)
    )

    @jax.jit
    def run(q, k, v):
        geometry = batch_geometry(PROMPT, patterns, batch=1, num_queries=t, q_start=None, blocks=blocks)
        plan = plan_batch(patterns, q, k, geometry, scale=0.125, blocks=blocks)
        return permute(plan, q, k, v, scale=0.125)

    return run(q, k, v)


@pytest.mark.slow
def test_every_pattern_in_the_interpreted_tpu_kernel():
    """All patterns in one launch, a head each: interpreting is slow, and two processes would do it twice."""
    x = inputs(tuple(PATTERNS), 2, "float32")
    launch = functools.partial(mosaic_tpu.launch, config=TpuConfig(tile_kv=256, compute_kv=128), interpret=True)
    (out, lse), (want, want_lse) = jax.device_get((jax.jit(launch)(x), jax.jit(reference.attend)(x)))
    terms = attention_terms(PROMPT.num_tokens, 64)
    for head, name in enumerate(PATTERNS):
        assert_same_up_to_order(lse[head], want_lse[head], terms=terms, what=name)
        assert np.isfinite(lse[head]).any(), name
        assert np.linalg.norm(out[head] - want[head]) <= reordering_error(1.0, terms) * np.linalg.norm(want[head]), name


@pytest.mark.slow
def test_a_plan_of_several_patterns_in_the_interpreted_hopper_kernel():
    """Heads of unlike plans are padded to one shape: rows that visit nothing, lists that end early."""
    x = inputs(("grid_slashes", "a_shape", "vertical_slash"), 1, "bfloat16")
    assert (np.asarray(x.index.first) < 0).any(), "an empty row of a padded head names no entry"
    config = HopperConfig(tile_kv=128, num_k_stages=2, num_v_stages=2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        out, lse = mosaic_gpu.launch(x, config, num_programs=2, interpretable=True)
    want, want_lse = jax.jit(reference.attend)(x)
    assert_same_up_to_order(lse, want_lse, terms=attention_terms(PROMPT.num_tokens, 64))
    out, want = (np.asarray(a, np.float64) for a in (out, want))
    assert np.linalg.norm(out - want) <= float(jnp.finfo(jnp.bfloat16).eps) * np.linalg.norm(want)


COMPILE = """
import functools, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from mmi_jax import Boundary2D, Grid, VerticalSlash
from mmi_jax.method.plan import batch_geometry, plan_batch
from mmi_jax.method.attention import permute
from pallas_kernels.block_lists.block_sizes import Blocks
from mmi_jax.layout import text_tokens
from pallas_kernels.attention.tpu import mosaic_tpu

topology = topologies.get_topology_desc(sys.argv[1], platform="tpu")
place, t, blocks = SingleDeviceSharding(topology.devices[0]), 2**20, Blocks(q=512)
q, k = (jax.ShapeDtypeStruct((1, t, h, 128), jnp.bfloat16) for h in (28, 4))
patterns = (Grid(use_slash=True),) * 14 + (VerticalSlash(1000, 4096),) * 7 + (Boundary2D({(1, 1): Grid()}),) * 7

def run(q, k, v, layout):
    geometry = batch_geometry(layout, patterns, batch=1, num_queries=t, q_start=None, blocks=blocks)
    return permute(plan_batch(patterns, q, k, geometry, scale=0.1, blocks=blocks), q, k, v, scale=0.1)

layout = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), text_tokens(t))
inputs = jax.eval_shape(run, q, k, k, layout)
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), inputs)
launch = functools.partial(mosaic_tpu.launch, config=mosaic_tpu.choose_config(inputs, topology.devices[0].device_kind))
jax.jit(launch).trace(shapes).lower(lowering_platforms=("tpu",)).compile()
print("compiled", inputs.index.start.shape)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_lists_of_a_million_tokens_compile_ahead_of_time(topology):
    """On the chips whose memory holds the arrays of 28 heads at once; the kernel is the same on the others."""
    env = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    child = subprocess.run([sys.executable, "-c", COMPILE, topology], env=env, text=True, capture_output=True)
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.startswith("compiled (28, ")
