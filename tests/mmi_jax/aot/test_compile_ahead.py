"""Shapes and the search of `mmi aot`; the compiler itself runs in tests/mmi_jax/cli/aot/test_cli_aot.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmi_jax import AShape, Blocks, Dense, Grid
from mmi_jax.aot import compile_ahead
from mmi_jax.aot.compile_ahead import Memory, Target, kernel_inputs, longest_that_fits, prefill_inputs
from mmi_jax.engine.settings.buckets import MAX_TOKENS, Buckets, default_buckets
from mmi_jax.method.tables.pattern_table import uniform_table
from mmi_jax.sharding import BOTH, Shards, make_mesh
from models.qwen2_5_vl import Qwen2_5_VL
from models.testing import TINY_CONFIG


def target(mesh=None, pattern=AShape(sink=128, local=256)) -> Target:  # noqa: B008
    model = nnx.eval_shape(lambda: Qwen2_5_VL(TINY_CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    table = uniform_table(pattern, num_layers=3, num_heads=4)
    mesh = mesh or make_mesh(list(range(8)), num_kv_heads=2)
    return Target(model=model, table=table, mesh=mesh, blocks=Blocks(q=256))


def one_device():
    return make_mesh(jax.devices()[:1], num_kv_heads=2)


def test_bucket_lengths_are_whole_blocks_of_every_device():
    lengths = target().buckets(50_000).lengths()
    assert lengths[:3] == [2048, 4096, 6144] and lengths[-1] == 49_152
    assert all(length % (8 * 256) == 0 for length in lengths)
    assert Buckets(smallest=128, largest=512, multiple=128).lengths() == [128, 256, 384, 512]


@pytest.mark.parametrize("shards", [Shards(sequence=4, heads=4), Shards(sequence=3)])
def test_prefill_on_a_mesh_takes_every_length_that_the_search_tries(shards):
    buckets = default_buckets(Blocks(q=512), shards)
    assert MAX_TOKENS <= buckets.length_for(MAX_TOKENS) == buckets.largest < MAX_TOKENS + buckets.multiple
    tried = target().buckets(MAX_TOKENS).lengths()
    assert tried[-1] == MAX_TOKENS and default_buckets(Blocks(), Shards()).largest == 2**20


@pytest.mark.parametrize("fixed", [0, 10**9])
@pytest.mark.parametrize("longest", [2048, 20_480, 24_576, 98_304, 2**20])
def test_the_search_finds_the_longest_length_in_few_steps(monkeypatch, fixed, longest):
    """Memory that grows a little faster than linearly, as temporaries do."""
    bytes_of = lambda n: fixed + 1000 * n + n**1.1  # noqa: E731
    limit, tried = bytes_of(longest), []

    def compile_prefill(target, num_tokens):
        tried.append(num_tokens)
        total = int(bytes_of(num_tokens))
        return Memory(arguments=0, total=total, limit=None if total <= limit else int(limit), compile_seconds=0.0)

    monkeypatch.setattr(compile_ahead, "compile_prefill", compile_prefill)
    memories = dict(longest_that_fits(target(), 2**20))
    assert max(n for n, memory in memories.items() if memory.fits) == longest
    assert len(tried) == len(set(tried)) <= 8


def test_nothing_fits(monkeypatch):
    memory = Memory(arguments=0, total=2, limit=1, compile_seconds=0.0)
    monkeypatch.setattr(compile_ahead, "compile_prefill", lambda *_: memory)
    assert not any(memory.fits for _, memory in longest_that_fits(target(), 20_000))


def test_kernel_inputs_are_those_of_one_device():
    inputs = kernel_inputs(target(), (Dense(),) * 2, 16_384)
    assert inputs.q.shape == (2, 16_384 // 4, 8) and inputs.k.shape == (1, 16_384, 8)
    assert inputs.q.dtype == jnp.bfloat16 and inputs.index.block_q == 256
    sorted_views = kernel_inputs(target(), (Grid(),) * 2, 16_384)
    assert sorted_views.k.shape == (1, 3 * 16_384, 8)


def test_shapes_say_where_weights_cache_and_tokens_lie():
    inputs = prefill_inputs(target(one_device()), 4096)
    weights, x, k = inputs.state, inputs.x, inputs.k
    assert isinstance(x.sharding, NamedSharding)
    assert weights["layers"]["mlp"]["up"]["kernel"].get_value().sharding.spec == P(None, BOTH)
    assert x.shape == (1, 4096, 16) and x.sharding.spec == P(None, BOTH, None)
    assert k.shape == (3, 1, 4096, 2, 8) and k.dtype == jnp.bfloat16
    assert inputs.rope_pos.shape == (3, 1, 4096) and inputs.layout.frame.shape == (1, 4096)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(weights))


class Refuses:
    """A traced program whose compilation fails as the TPU compiler does."""

    def __init__(self, message: str):
        self.message = message

    def lower(self, **_):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_that_does_not_fit_has_its_figures():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    memory = compile_ahead._finish(Refuses(message), 2**30, start=0.0)
    assert not memory.fits and memory.total == 20.5 * 2**30 and memory.limit == 15.75 * 2**30
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.10G) "
        "exceeds available HBM (15.75G). HLO module: jit_run."
    )
    memory = compile_ahead._finish(Refuses(early), 2**30, start=0.0)
    assert not memory.fits and memory.total == round(28.1 * 2**30) and memory.limit == 15.75 * 2**30
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_ahead._finish(Refuses("INTERNAL: something else"), 0, start=0.0)


def test_an_attention_function_runs_in_place_of_a_backend():
    """A substitute for the kernel of a chip that is not attached."""
    from mmi_jax.layout import text_tokens
    from mmi_jax.method.dispatch import attend_sparsely
    from pallas_kernels.attention import xla

    calls = []

    def attend(inputs):
        calls.append(inputs.q.shape)
        return xla.attend(inputs)

    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 2, 8)), jnp.float32)
    run = functools.partial(attend_sparsely, q, q, q, Dense(), layout=text_tokens(32), blocks=Blocks(q=16, kv=16))
    np.testing.assert_array_equal(run(implementation=attend).out, run(implementation="xla").out)
    assert calls == [(2, 32, 8)]
