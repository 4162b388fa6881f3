"""prefill: a prompt through all layers of a model, compiled once per bucket.

The settings come as keywords or as one `PrefillOptions`, see `mmi_jax.engine.settings.options` for why both. From there
on a prefill is three values: the `PrefillRequest` (what runs, on the host), the KV cache (what is described before the
layers run and filled by them), and for each chunk its `ChunkInputs` (what the compiled programs are given).
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int, PyTree

from mmi_jax.engine.kv_cache import KVCache, empty_cache, with_capacity
from mmi_jax.engine.memory.memory_check import check_memory, explained_exhaustion
from mmi_jax.engine.memory.memory_plan import bytes_of, memory_request
from mmi_jax.engine.programs.chunk_inputs import ChunkInputs
from mmi_jax.engine.programs.compilation import Statistics, compiled_chunk, pieces_of
from mmi_jax.engine.programs.layer_program import Program
from mmi_jax.engine.prompts import (
    check_cache,
    continued,
    fit_layout,
    fit_prompt,
    lengths_of,
    logit_tokens,
    prior_cache,
)
from mmi_jax.engine.protocols import Prompt, VisionLanguageModel
from mmi_jax.engine.reporting.report import PrefillReport
from mmi_jax.engine.reporting.stages import Stage
from mmi_jax.engine.settings.options import PrefillOptions, PrefillSettings, options_of
from mmi_jax.engine.settings.request import PrefillRequest, request_for
from mmi_jax.method.dispatch import position_equals_index
from mmi_jax.sharding import CACHE_SPEC, ROPE_SPEC, TOKENS_SPEC, place, weight_specs
from pallas_kernels.notation import AnyArray, Array, Float, Int32
from pallas_kernels.pytree import pytree

type OnStage = Callable[[str], None]
"""Called with the name of each stage as it begins, see `CLOCK_STAGES`."""


@pytree
class PrefillResult:
    """Result of a prefill.

    Args:
      logits: of the token after each prompt's last, float32.
      logits_at: of the token after each token of `prefill(logits_at=...)`, float32; None without it.
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
    prompt: Prompt,
    *,
    options: PrefillOptions | None = None,
    cache: KVCache | PrefillResult | None = None,
    donates_cache: bool = False,
    logits_at: Int[AnyArray, "b n"] | None = None,
    on_stage: OnStage | None = None,
    **settings: Unpack[PrefillSettings],
) -> PrefillResult:
    """Logits of the next token, the KV cache and a report, for a batch of right-padded prompts.

    Args:
      model: a `VisionLanguageModel`.
      prompt: with `tokens [b, t]`, `rope_pos [3, b, t]`, `layout` (fields `[b, t]`) and whatever `model.embed` reads.
      options: the settings, all of them in one value.
      cache: of an earlier prefill, or its result: the prompt is what follows, a further piece of a video or another
        question, counted from 0 as if it stood alone. All its prompts must hold equally many tokens. A sparse plan
        is made for the new queries over all keys. The cache is enlarged where the padded prompt does not fit it.
      donates_cache: the given cache's memory becomes the result's, and the cache must not be used again, except through
        `KVCache.reclaim`. Otherwise it stays as it is and the result holds a copy.
      logits_at: tokens of each prompt, anywhere in it, after which next-token logits are computed, not only after
        the last; in `PrefillResult.logits_at`. Their number `n` is a size of the compiled program, their places not.
      on_stage: called with the name of each stage as it begins: vision, then compile and prefill for every chunk.
      **settings: fields of `PrefillOptions`, which describes them, in place of those of `options`: `table`,
        `chunk_tokens`, `max_new_tokens`, `buckets`, `blocks`, `implementation`, `measures_recall`, `may_run_dense`,
        `mesh`.

    Raises:
      ValueError: the prompt is empty or too long, the table is for another model, the sizes do not fit each other,
        `logits_at` names tokens that are not there, or q or k are not finite in a layer; the message names it.
      DoesNotFitError: the device's memory is known and too small, or ran out; the message lists changes that fit.
    """
    lengths = lengths_of(prompt)
    read_tokens = logit_tokens(lengths, logits_at)
    prior = cache.cache if isinstance(cache, PrefillResult) else cache
    request = request_for(
        model.config,
        int(lengths.max()),
        options_of(options, settings),
        batch=len(lengths),
        prior=prior_cache(prior),
    )
    if prior is not None:
        check_cache(prior, model, batch=len(lengths))
    padded = fit_prompt(prompt, request.lengths.padded_tokens)
    run = _Run(
        model=model,
        request=request,
        prompt=padded,
        lengths=lengths,
        logit_tokens=read_tokens,
        prior=prior,
        donates=donates_cache,
    )
    with _memory_checked(run, prompt):
        return run(_Clock(on_stage))


@contextlib.contextmanager
def _memory_checked(run: "_Run", prompt: Prompt) -> Iterator[None]:
    """Refuses a prefill that does not fit one device before it runs, and explains exhausted memory while it does."""
    request, prior = run.request, run.prior
    if request.options.mesh is not None:  # what each device holds is the compiler's to say, see `mmi aot`
        yield
        return
    memory = memory_request(request, run.model, embed_bytes=run.model.embed_bytes(prompt))
    is_reused = prior is not None and run.donates and prior.capacity == request.lengths.capacity
    check_memory(memory, bytes_of((prior.k, prior.v)) if prior is not None and is_reused else 0)
    with explained_exhaustion(memory):
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """A prefill of a batch that was checked and padded.

    Args:
      prompt: padded to its bucket, host arrays.
      lengths: tokens of each prompt.
      logit_tokens: tokens of each prompt after which logits are computed, `[b, n]`.
      prior: the cache that is continued.
      donates: whether the prior cache is donated.
    """

    model: VisionLanguageModel
    request: PrefillRequest
    prompt: Prompt
    lengths: np.ndarray
    logit_tokens: np.ndarray
    prior: KVCache | None
    donates: bool

    def __call__(self, clock: "_Clock") -> PrefillResult:
        """The result."""
        from flax import nnx  # here, so that attention and its benchmarks need no flax

        request, mesh = self.request, self.request.options.mesh
        with clock(Stage.VISION):
            x = jax.block_until_ready(self.model.embed(self.prompt))
        program = request.program(self.model, position_is_index=position_equals_index(self.prompt.layout))
        cache, rope_pos = self._described_cache(x)
        graphdef, state = nnx.split(self.model)
        state = place(state, mesh, weight_specs(state, request.shards))
        logit_places = self.logit_tokens + request.lengths.prior_tokens
        inputs = ChunkInputs(
            state=state,
            layer_state=nnx.split(nnx.merge(graphdef, state).layers)[1],
            rope_pos=place(rope_pos, mesh, ROPE_SPEC),
            layout=cache.layout,
            q_start=jnp.int32(0),
            x=place(x, mesh, TOKENS_SPEC),
            k=cache.k,
            v=cache.v,
            logit_places=place(_on_device(logit_places), mesh, P()),
            hidden=place(jnp.zeros((*logit_places.shape, x.shape[2]), x.dtype), mesh, P()),
        )
        del x  # the program takes its memory over
        inputs, statistics = _run_chunks(program, inputs, request.lengths.starts, clock)
        _check_finite(statistics, np.asarray(inputs.hidden))
        report = PrefillReport.build(
            layout=self.prompt.layout,
            table=request.table,
            padded_tokens=request.lengths.padded_tokens,
            seconds=clock.seconds,
            statistics=statistics,
        )
        logits = next_logits(graphdef, state, inputs.hidden, mesh)
        return PrefillResult(
            logits=logits[:, 0],
            logits_at=logits[:, 1:] if logit_places.shape[1] > 1 else None,
            hidden=inputs.hidden[:, 0],
            cache=dataclasses.replace(cache, k=inputs.k, v=inputs.v),
            report=report,
        )

    def _described_cache(self, x: Array) -> tuple[KVCache, Int32[Array, "3 b t"]]:
        """A cache of the padded prompts' capacity with all of them but their keys and values; rotary positions."""
        if self.prior is not None:
            return self._continued_cache(self.prior)
        config, mesh, capacity = self.request.config, self.request.options.mesh, self.request.lengths.capacity
        cache = empty_cache(
            num_layers=config.num_layers,
            batch=x.shape[0],
            capacity=capacity,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=x.dtype,
            sharding=None if mesh is None else NamedSharding(mesh, CACHE_SPEC),
        )
        layout = self.prompt.layout
        last_rope_pos = np.where(layout.is_real, self.prompt.rope_pos, -1).max(axis=(0, 2))
        cache = dataclasses.replace(
            cache,
            layout=place(_on_device(fit_layout(layout, capacity)), mesh, P()),
            lengths=place(_on_device(self.lengths), mesh, P()),
            next_rope_pos=_on_device(last_rope_pos + 1),
        )
        return cache, _on_device(self.prompt.rope_pos)

    def _continued_cache(self, prior: KVCache) -> tuple[KVCache, Int32[Array, "3 b t"]]:
        """The prior cache enlarged for what follows, and its description; rotary positions of what follows."""
        lengths = self.request.lengths
        rope_pos, layout, next_rope_pos = continued(
            prior.layout,
            jnp.int32(lengths.prior_tokens),
            prior.next_rope_pos,
            jnp.asarray(self.prompt.rope_pos),
            jax.tree.map(jnp.asarray, self.prompt.layout),
            capacity=lengths.capacity,
        )
        k, v = (with_capacity(x, lengths.capacity, donates=self.donates) for x in (prior.k, prior.v))
        all_tokens = prior.lengths + jnp.asarray(self.lengths, jnp.int32)
        return KVCache(k=k, v=v, lengths=all_tokens, next_rope_pos=next_rope_pos, layout=layout), rope_pos


def _on_device(tree: PyTree) -> PyTree:
    """Host arrays of integers on the device, int32; `jnp.asarray` would compile a program for each shape."""
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x, np.int32)), tree)


def _run_chunks(
    program: Program, inputs: ChunkInputs[Array], starts: range, clock: "_Clock"
) -> tuple[ChunkInputs[Array], list[Statistics]]:
    """All chunks one after another: the inputs with keys, values and hidden states filled in, and statistics.

    Args:
      inputs: with embeddings and rotary positions of the tokens from the first start on; `x`, `k` and `v` are donated.
    """
    numbers = [place(jnp.int32(n), program.mesh, P()) for n in range(len(program.layers))]
    all_x, all_rope_pos, statistics = inputs.x, inputs.rope_pos, []
    for start in starts:
        tokens = slice(start - starts.start, start - starts.start + starts.step)
        x, rope_pos = (all_x, all_rope_pos) if len(starts) == 1 else (all_x[:, tokens], all_rope_pos[:, :, tokens])
        q_start = place(jnp.int32(start), program.mesh, P())
        inputs = dataclasses.replace(inputs, x=x, rope_pos=rope_pos, q_start=q_start)
        with clock(Stage.COMPILE):
            chunk = compiled_chunk(program, inputs)
        with clock(Stage.PREFILL):
            hidden, k, v, layer_statistics = chunk.run(numbers, inputs)
            inputs = dataclasses.replace(inputs, k=k, v=v, hidden=hidden)
            jax.block_until_ready((hidden, k, v))
        statistics += pieces_of(jax.device_get(layer_statistics))
    return inputs, statistics


def next_logits(
    graphdef: Any, state: PyTree, hidden: Float[Array, "b n e"], mesh: Mesh | None
) -> Float[Array, "b n v"]:
    """Float32 logits, on every device of a mesh."""
    from flax import nnx

    if mesh is None:
        return nnx.merge(graphdef, state).unembed(hidden)
    unembed = jax.jit(lambda state, x: nnx.merge(graphdef, state).unembed(x), out_shardings=NamedSharding(mesh, P()))
    return unembed(state, hidden)


def _check_finite(statistics: list[Statistics], hidden: np.ndarray) -> None:
    for chunk in statistics:
        if not chunk["is_finite"].all():
            layer, example = np.argwhere(~chunk["is_finite"])[0]
            raise ValueError(f"q and k must be finite: layer {layer} has NaN or infinity in example {example}")
    is_finite = np.isfinite(hidden).all(axis=(1, 2))
    if not is_finite.all():
        layer, example = len(statistics[0]["is_finite"]) - 1, int(np.argmin(is_finite))
        raise ValueError(f"hidden states must be finite: layer {layer} left NaN or infinity in example {example}")


class _Clock:
    """Wall time by stage: `with clock(Stage.VISION): ...` adds to `seconds["vision"]`."""

    def __init__(self, on_stage: OnStage | None):
        self.seconds: dict[str, float] = {}
        self.on_stage = on_stage

    @contextlib.contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        name = stage.value
        if self.on_stage is not None:
            self.on_stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
