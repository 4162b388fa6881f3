"""prefill: a prompt through all layers of a model, compiled once per bucket."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from mmi_jax.engine.kv_cache import KVCache, empty_cache, with_capacity
from mmi_jax.engine.memory.memory_check import check_room, explained_exhaustion
from mmi_jax.engine.memory.memory_plan import bytes_of
from mmi_jax.engine.programs.compilation import compiled_chunk, pieces_of
from mmi_jax.engine.programs.layer_program import Program
from mmi_jax.engine.prompts import (
    check_cache,
    continued,
    fit_layout,
    fit_prompt,
    held_tokens,
    lengths_of,
    wanted_tokens,
)
from mmi_jax.engine.reporting.report import PrefillReport
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.engine.settings.padded_lengths import Sizes
from mmi_jax.engine.settings.request import Request, request_for
from mmi_jax.method.attention import Vendor
from mmi_jax.method.dense_attention import is_plain
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.tables.pattern_table import PatternTable
from mmi_jax.sharding import CACHE_SPEC, ROPE_SPEC, TOKENS_SPEC, place, weight_specs
from pallas_kernels.attention.api import Backend
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import AnyArray, Array, Float
from pallas_kernels.pytree import pytree


@runtime_checkable
class ModelConfig(Protocol):
    """The sizes that prefill reads of a model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    mlp_dim: int
    vocab_size: int


@runtime_checkable
class VisionLanguageModel(Protocol):
    """What prefill asks of a model: an `nnx.Module` whose `layers` carry a leading layer axis.

    A layer is called as `layer(x, rotary, attend) -> (x, aux)`, where `attend(q, k, v) -> (out, aux)` takes
    `[b, t, h, d]` and `[b, t, g, d]` after rotation.
    """

    config: Any
    dtype: Any
    layers: Any
    embedding: Callable[..., Any]

    def embed(self, prompt: Any) -> Any:
        """Embeddings `[b, t, e]` of the tokens, vision included."""
        ...

    def embed_bytes(self, prompt: Any) -> int:
        """Bytes that `embed` holds on the device at a time, besides weights and the embeddings; for the planner."""
        ...

    def rotary(self, rope_pos: Any) -> Any:
        """Whatever the layers need to rotate by positions `[3, b, t]`."""
        ...

    def unembed(self, x: Any) -> Any:
        """Logits, float32, of embeddings `[b, e]`."""
        ...


@pytree
class PrefillResult:
    """What a prefill leaves.

    Args:
      logits: of the token after each prompt's last, float32.
      logits_at: of the token after each of the asked ones, float32; None when none were asked.
      hidden: the last layer's output at each prompt's last token.
      cache: keys and values of all layers.
      report: what was skipped and what it cost.
    """

    logits: Float[Array, "b v"]
    logits_at: Float[Array, "b n v"] | None
    hidden: Float[Array, "b e"]
    cache: KVCache
    report: PrefillReport


def prefill(
    model: VisionLanguageModel,
    prompt: Any,
    *,
    table: PatternTable | Pattern | None = None,
    chunk_tokens: int | None = None,
    max_new_tokens: int = 0,
    cache: KVCache | PrefillResult | None = None,
    donates_cache: bool = False,
    logits_at: Int[AnyArray, "b n"] | None = None,
    buckets: Buckets | None = None,
    blocks: Blocks | None = None,
    implementation: Backend | Vendor | None = None,
    measures_recall: bool = True,
    may_run_dense: bool = True,
    mesh: Mesh | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> PrefillResult:
    """Logits of the next token, the KV cache and a report, for a batch of right-padded prompts.

    Args:
      model: a `VisionLanguageModel`.
      prompt: with `tokens [b, t]`, `rope_pos [3, b, t]`, `layout` (fields `[b, t]`) and whatever `model.embed` reads.
      table: a pattern for each layer and head, one pattern for all, or None for dense attention.
      chunk_tokens: prompt tokens that go through the layers at once, a multiple of the block size; all when None.
        Dense attention gives the same result for any value. A sparse plan is made per chunk from the chunk's own last
        queries, so a dynamic pattern may choose other columns, diagonals or phases in each chunk, and "the last
        queries" of Tri-shape are each chunk's.
      max_new_tokens: room to leave in the cache for decoding, or for what will follow.
      cache: of a prefill before, or its result: the prompt is what follows, a further piece of a video or another
        question, counted from 0 as if it stood alone. All its prompts must hold equally many tokens. A sparse plan
        is made for the new queries over all keys. The cache is enlarged where it has no room for the padded prompt.
      donates_cache: the given cache's memory becomes the result's, and the cache must not be used again, save through
        `KVCache.reclaim`. Otherwise it stays as it is and the result holds a copy.
      logits_at: tokens of each prompt, anywhere in it, after which next-token logits are wanted besides those after the
        last; in `PrefillResult.logits_at`. Their number `n` is a size of the compiled program, their places are not.
      buckets: padded lengths.
      blocks: tile sizes.
      implementation: see `attend_sparsely`.
      measures_recall: estimate per head the share of attention kept, which costs `64 / t` of dense attention.
      may_run_dense: heads, or whole layers, for which the device's cost model expects dense attention to be faster at
        this length run dense; the report names the patterns that ran. Where nothing was measured all run as asked.
      mesh: cuts the prompt, the weights and the cache over its devices; see `mmi_jax.sharding`, `make_mesh` and
        `shard_model`. The whole prompt runs at once. Dense attention and static patterns give what one device gives,
        save "the last queries" of Tri-shape, which are each piece's; so are those that a dynamic pattern estimates
        from, and it may choose other columns, diagonals or phases for each piece.
      on_stage: called with the name of each stage as it begins: vision, then compile and prefill for every chunk.

    Raises:
      ValueError: the prompt is empty or too long, the table is for another model, the sizes do not fit each other,
        `logits_at` names tokens that are not there, or q or k are not finite in a layer; the message names it.
      DoesNotFitError: the device's memory is known and too small, or ran out; the message says what would fit.
    """
    lengths = lengths_of(prompt)
    wanted = wanted_tokens(lengths, logits_at)
    before = cache.cache if isinstance(cache, PrefillResult) else cache
    request = request_for(
        model.config,
        int(lengths.max()),
        batch=len(lengths),
        held=0 if before is None else held_tokens(before),
        held_capacity=0 if before is None else before.capacity,
        table=table,
        chunk_tokens=chunk_tokens,
        max_new_tokens=max_new_tokens,
        buckets=buckets,
        blocks=blocks,
        implementation=implementation,
        measures_recall=measures_recall,
        may_run_dense=may_run_dense,
        mesh=mesh,
    )
    if before is not None:
        check_cache(before, model, batch=len(lengths))
    padded, clock = fit_prompt(prompt, request.sizes.padded), _Clock(on_stage)
    if mesh is not None:
        return _run(model, request, padded, lengths, wanted, before, donates_cache, clock)
    memory = request.memory_task(model, embed_bytes=model.embed_bytes(prompt))
    takes_over = before is not None and donates_cache and before.capacity == request.sizes.capacity
    check_room(memory, bytes_of((before.k, before.v)) if before is not None and takes_over else 0)
    with explained_exhaustion(memory):
        return _run(model, request, padded, lengths, wanted, before, donates_cache, clock)


def _run(
    model, request: Request, padded: Any, lengths: np.ndarray, wanted: np.ndarray, before: KVCache | None,
    donates: bool, clock: "_Clock",
) -> PrefillResult:  # fmt: skip
    """The prefill of a batch that was checked and padded."""
    from flax import nnx  # here, so that attention and its benchmarks need no flax

    sizes, mesh = request.sizes, request.mesh
    with clock("vision"):
        x = jax.block_until_ready(model.embed(padded))
    program = request.program(model, is_plain=is_plain(padded.layout))
    if before is None:
        filled, rope_pos = _described_cache(model.config, x, padded, lengths, sizes, mesh)
    else:
        filled, rope_pos = _continued_cache(before, padded, lengths, sizes, donates=donates)
    graphdef, state = nnx.split(model)
    state = place(state, mesh, weight_specs(state, request.shards(model.config.num_kv_heads)))
    inputs = place(x, mesh, TOKENS_SPEC), place(rope_pos, mesh, ROPE_SPEC)
    del x  # the program takes its memory over
    states = state, nnx.split(nnx.merge(graphdef, state).layers)[1]
    filled, hidden, statistics = _run_chunks(program, states, inputs, filled, wanted + sizes.held, sizes.starts, clock)
    _check_finite(statistics, np.asarray(hidden))
    report = PrefillReport.build(
        layout=padded.layout,
        table=request.table,
        padded_tokens=sizes.padded,
        seconds=clock.seconds,
        statistics=statistics,
    )
    logits = next_logits(graphdef, state, hidden, mesh)
    return PrefillResult(
        logits=logits[:, 0],
        logits_at=logits[:, 1:] if wanted.shape[1] > 1 else None,
        hidden=hidden[:, 0],
        cache=filled,
        report=report,
    )


def _described_cache(
    config: ModelConfig, x, padded: Any, lengths: np.ndarray, sizes: Sizes, mesh: Mesh | None
) -> tuple[KVCache, Any]:
    """A cache with room for the padded prompts that knows all of them but their keys and values; rotary positions."""
    cache = empty_cache(
        num_layers=config.num_layers,
        batch=x.shape[0],
        capacity=sizes.capacity,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=x.dtype,
        sharding=None if mesh is None else NamedSharding(mesh, CACHE_SPEC),
    )
    last_rope_pos = np.where(padded.layout.is_real, padded.rope_pos, -1).max(axis=(0, 2))
    cache = dataclasses.replace(
        cache,
        layout=place(_on_device(fit_layout(padded.layout, sizes.capacity)), mesh, P()),
        lengths=place(_on_device(lengths), mesh, P()),
        next_rope_pos=_on_device(last_rope_pos + 1),
    )
    return cache, _on_device(padded.rope_pos)


def _on_device(tree: Any) -> Any:
    """Host arrays of integers on the device, int32; `jnp.asarray` would compile a program for each shape."""
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x, np.int32)), tree)


def _continued_cache(
    before: KVCache, padded: Any, lengths: np.ndarray, sizes: Sizes, *, donates: bool
) -> tuple[KVCache, Any]:
    """The cache with room for what follows, and its description; rotary positions of what follows."""
    new_layout = jax.tree.map(jnp.asarray, padded.layout)
    rope_pos, layout, next_rope_pos = continued(
        before.layout, jnp.int32(sizes.held), before.next_rope_pos, jnp.asarray(padded.rope_pos), new_layout,
        capacity=sizes.capacity,
    )  # fmt: skip
    k, v = (with_capacity(x, sizes.capacity, donates=donates) for x in (before.k, before.v))
    in_all = before.lengths + jnp.asarray(lengths, jnp.int32)
    return KVCache(k=k, v=v, lengths=in_all, next_rope_pos=next_rope_pos, layout=layout), rope_pos


def _run_chunks(program: Program, states, inputs, cache: KVCache, wanted, starts: range, clock: "_Clock"):
    """All chunks one after another: the cache with its keys and values, the wanted hidden states, and statistics.

    Args:
      states: of the model and of its layers.
      inputs: embeddings and rotary positions of the tokens from the first start on; the embeddings are given up.
    """
    x, rope_pos = inputs
    hidden = place(jnp.zeros((*wanted.shape, x.shape[2]), x.dtype), program.mesh, P())
    wanted = place(_on_device(wanted), program.mesh, P())
    numbers = [place(jnp.int32(n), program.mesh, P()) for n in range(len(program.layers))]
    k, v = cache.k, cache.v
    statistics = []
    for start in starts:
        tokens = slice(start - starts.start, start - starts.start + starts.step)
        here, rope_here = (x, rope_pos) if len(starts) == 1 else (x[:, tokens], rope_pos[:, :, tokens])
        q_start = place(jnp.int32(start), program.mesh, P())
        place_args = states, rope_here, cache.layout, q_start
        with clock("compile"):
            chunk = compiled_chunk(program, *place_args, here, k, v, wanted, hidden)
        with clock("prefill"):
            here, k, v, layer_statistics = chunk.run_layers(numbers, *place_args, here, k, v)
            hidden = chunk.end(here, wanted, q_start, hidden)
            jax.block_until_ready((hidden, k, v))
        statistics += pieces_of(jax.device_get(layer_statistics))
    return dataclasses.replace(cache, k=k, v=v), hidden, statistics


def next_logits(graphdef, state, hidden, mesh: Mesh | None):
    """Float32 logits `[b, n, v]`, on every device of a mesh."""
    from flax import nnx

    if mesh is None:
        return nnx.merge(graphdef, state).unembed(hidden)
    unembed = jax.jit(lambda state, x: nnx.merge(graphdef, state).unembed(x), out_shardings=NamedSharding(mesh, P()))
    return unembed(state, hidden)


def _check_finite(statistics: list[dict[str, np.ndarray]], hidden: np.ndarray) -> None:
    for chunk in statistics:
        if not chunk["is_finite"].all():
            layer, example = np.argwhere(~chunk["is_finite"])[0]
            raise ValueError(f"q and k must be finite: layer {layer} has NaN or infinity in example {example}")
    is_finite = np.isfinite(hidden).all(axis=(1, 2))
    if not is_finite.all():
        layer, example = len(statistics[0]["is_finite"]) - 1, int(np.argmin(is_finite))
        raise ValueError(f"hidden states must be finite: layer {layer} left NaN or infinity in example {example}")


class _Clock:
    """Wall time by stage: `with clock("vision"): ...` adds to `seconds["vision"]`."""

    def __init__(self, on_stage: Callable[[str], None] | None):
        self.seconds: dict[str, float] = {}
        self.on_stage = on_stage

    @contextlib.contextmanager
    def __call__(self, stage: str):
        if self.on_stage is not None:
            self.on_stage(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
