"""The plan of a prefill's memory against what is allocated, and what is said of a prompt that does not fit."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mmi_jax import Blocks, Buckets, Dense, Grid, PrefillResult
from mmi_jax import prefill as run_prefill
from mmi_jax.aot.compile_ahead import layout_shape
from mmi_jax.engine import prefill as engine_prefill
from mmi_jax.engine.memory import memory_check
from mmi_jax.engine.memory.chips import GIB
from mmi_jax.engine.memory.memory_check import (
    DeviceMemory,
    DoesNotFitError,
    check_fits,
    longest_that_fits,
    what_fits,
)
from mmi_jax.engine.memory.memory_plan import MemoryRequest, bytes_of, plan_memory, weight_bytes
from mmi_jax.engine.programs.chunk_inputs import ChunkInputs
from mmi_jax.engine.programs.compilation import layer_arguments
from mmi_jax.engine.programs.layer_program import Program
from mmi_jax.engine.protocols import ModelConfig
from mmi_jax.engine.reporting.stages import MEMORY_STAGES
from mmi_jax.engine.settings.options import PrefillOptions
from mmi_jax.engine.settings.request import request_for
from mmi_jax.method.patterns import Pattern
from models.qwen2_5_vl.checkpoints.weights import abstract_model
from models.qwen2_5_vl.presets import PRESETS
from models.testing import BLOCKS, BUCKETS, STATIC, TINY_CONFIG, prompt, tiny_model

ONE = prompt(0, 9, (3, 2, 5), 17)
DENSE = Dense()
SEVEN_B = PRESETS["7b"]


def request(
    pattern: Pattern = DENSE,
    *,
    config: ModelConfig = SEVEN_B,
    model_bytes: int | None = None,
    dtype: Any = jnp.bfloat16,
    batch: int = 1,
    num_tokens: int = 2**17,
    embed_bytes: int = 0,
    **settings: Any,
) -> MemoryRequest:
    """A 7B prefill; settings override its defaults."""
    prefill = request_for(config, num_tokens, PrefillOptions(table=pattern, **settings), batch=batch)
    model_bytes = weight_bytes(abstract_model(SEVEN_B)) if model_bytes is None else model_bytes
    return MemoryRequest(prefill=prefill, weight_bytes=model_bytes, dtype=dtype, embed_bytes=embed_bytes)


def test_weights_cache_and_embeddings_are_counted_to_the_byte():
    plan = plan_memory(request())
    sizes = {buffer.name: buffer.num_bytes for buffer in plan.buffers}
    assert sizes["weights"] == 2 * 8_292_166_656
    assert sizes["cache: keys and values"] == 2 * 2 * 28 * 2**17 * 4 * 128
    assert sizes["x, embeddings and then every layer's output"] == 2 * 2**17 * 3584
    assert plan.peak == max(plan.bytes_in(stage) for stage in MEMORY_STAGES) == plan.bytes_in(plan.peak_stage)


def test_a_cache_of_the_engine_is_the_cache_of_the_plan():
    result = run_prefill(tiny_model(), ONE, buckets=BUCKETS, blocks=BLOCKS, max_new_tokens=30)
    plan = plan_memory(tiny_request(max_new_tokens=30))
    planned = next(b for b in plan.buffers if b.name.startswith("cache"))
    assert planned.num_bytes == result.cache.k.nbytes + result.cache.v.nbytes
    assert planned.shape == (2, *result.cache.k.shape)


def test_the_vision_tower_may_be_the_peak_of_a_short_prompt_but_not_of_a_long_one():
    short, long = (request(num_tokens=n, embed_bytes=1_500_000_000) for n in (2048, 2**20))
    plan = plan_memory(short)
    assert plan.peak_stage == "embed" and plan.peak == plan.weight_bytes + 1_500_000_000 + 2 * 2048 * 3584
    assert plan_memory(long).peak == plan_memory(dataclasses.replace(long, embed_bytes=0)).peak


def test_the_plan_counts_the_tower_of_the_prompt(monkeypatch):
    model, planned = tiny_model(), []
    monkeypatch.setattr(engine_prefill, "check_memory", lambda memory, _: planned.append(memory.embed_bytes))
    prefill(measures_recall=False)
    assert planned == [model.embed_bytes(ONE)] and planned[0] > 0 and model.embed_bytes(prompt(0, 9)) == 0


def tiny_request(**settings: Any) -> MemoryRequest:
    model_bytes = weight_bytes(tiny_model())
    tiny: dict[str, Any] = dict(config=TINY_CONFIG, dtype=jnp.float32, num_tokens=58, blocks=BLOCKS, buckets=BUCKETS)
    return request(model_bytes=model_bytes, **tiny | settings)


@pytest.mark.parametrize(("pattern", "num_tokens"), [(Dense(), 32768), (STATIC, 16384)])
def test_the_plan_is_what_the_compiler_allocates(pattern, num_tokens):
    """Temporary bytes of the CPU's program, whose stages hold the same arrays as a GPU's, within 20 %."""
    config = dataclasses.replace(
        PRESETS["3b"],
        num_layers=2,
        embed_dim=64,
        mlp_dim=512,
        num_heads=4,
        vision=dataclasses.replace(PRESETS["3b"].vision, out_dim=64),
    )
    row = (pattern,) * 4
    plan = plan_memory(request(pattern, config=config, dtype=jnp.float32, num_tokens=num_tokens))
    arguments = ("weights", "cache: keys and values", "x, embeddings and then every layer's output")
    planned = plan.peak - sum(b.num_bytes for b in plan.buffers if b.name in arguments)
    assert temporary_bytes(config, row, num_tokens) == pytest.approx(planned, rel=0.2)


def temporary_bytes(config, row, num_tokens: int) -> int:
    model = abstract_model(config, dtype=jnp.float32)
    (graphdef, state), (layer_graphdef, weights) = nnx.split(model), nnx.split(model.layers)
    program = Program(
        graphdef=graphdef, layer_graphdef=layer_graphdef, layers=(row,), blocks=Blocks(), measures_recall=False
    )
    shape = lambda *axes, dtype=jnp.int32: jax.ShapeDtypeStruct(axes, dtype)  # noqa: E731
    cache = shape(2, 1, num_tokens, config.num_kv_heads, config.head_dim, dtype=jnp.float32)
    x = shape(1, num_tokens, config.embed_dim, dtype=jnp.float32)
    inputs = ChunkInputs(
        state=state,
        layer_state=weights,
        rope_pos=shape(3, 1, num_tokens),
        layout=layout_shape(shape(1, num_tokens)),
        q_start=shape(),
        x=x,
        k=cache,
        v=cache,
        logit_places=shape(1, 1),
        hidden=shape(1, 1, config.embed_dim, dtype=jnp.float32),
    )
    args = layer_arguments(program, inputs)[row]
    compiled = program.layer(weights, config.num_kv_heads).lower(*args).compile()
    memory, rotary = compiled.memory_analysis(), args[2][0]
    assert memory is not None
    return memory.temp_size_in_bytes + bytes_of(rotary)


def test_a_prompt_that_does_not_fit_is_told_what_would():
    with pytest.raises(DoesNotFitError) as refusal:
        check_fits(request(num_tokens=2**20, batch=2), DeviceMemory(limit=120 * GIB, used=3 * GIB))
    message = str(refusal.value)
    assert re.search(
        r"2 x 1,048,576 tokens must fit the device's memory: it needs "
        r"\d+\.\d GiB at its peak, stage \w+ \(cache: keys and values 112",
        message,
    )
    assert "the device has 120.0 GiB less 3.0 GiB that other arrays take" in message
    assert "1 prompt at a time" in message and "at most 655,360 tokens in the same way" in message


@pytest.mark.slow
def test_what_is_said_to_fit_fits_and_what_is_longer_does_not():
    limit, whole_prompt = 54 * GIB, request(Grid(), num_tokens=2**19)
    assert plan_memory(whole_prompt).peak > limit
    chunk = next(text for text in what_fits(whole_prompt, limit) if text.startswith("chunk_tokens="))
    size = int(re.findall(r"\d+", chunk)[0])
    assert plan_memory(whole_prompt.with_options(chunk_tokens=size)).peak <= limit
    assert plan_memory(whole_prompt.with_options(chunk_tokens=2 * size)).peak > limit
    longest = longest_that_fits(whole_prompt, limit)
    assert longest is not None and plan_memory(whole_prompt.with_prompts(num_tokens=longest)).peak <= limit
    assert plan_memory(whole_prompt.with_prompts(num_tokens=Buckets().length_for(longest + 1))).peak > limit
    assert list(what_fits(whole_prompt, 10 * GIB)) == []


def prefill(**kwargs) -> PrefillResult:
    return run_prefill(tiny_model(), ONE, buckets=BUCKETS, blocks=BLOCKS, **kwargs)


def test_prefill_refuses_before_it_allocates(monkeypatch):
    monkeypatch.setattr(memory_check, "memory_of", lambda device: DeviceMemory(limit=10_000))
    monkeypatch.setattr(type(tiny_model()), "embed", lambda *_: pytest.fail("allocated embeddings"))
    with pytest.raises(DoesNotFitError, match="1 x 58 tokens must fit the device's memory.*Changes that fit: nothing"):
        prefill()


def test_exhausted_memory_is_explained_and_the_next_run_works(monkeypatch):
    before = prefill()
    whole = engine_prefill.compiled_chunk

    def exhausted(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")

    monkeypatch.setattr(engine_prefill, "compiled_chunk", exhausted)
    with pytest.raises(DoesNotFitError, match="ran out of memory, in a prefill of 1 x 58 tokens that was planned"):
        prefill()
    monkeypatch.setattr(engine_prefill, "compiled_chunk", whole)
    assert (prefill().logits == before.logits).all()
