"""Warm-up: the programs of coming prefills, compiled side by side ahead of the first request."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Unpack

import jax
import jax.numpy as jnp

from mmi_jax.engine.kv_cache import empty_cache
from mmi_jax.engine.memory.memory_check import check_memory
from mmi_jax.engine.memory.memory_plan import memory_request
from mmi_jax.engine.prefill import next_logits
from mmi_jax.engine.programs.chunk_inputs import ChunkInputs
from mmi_jax.engine.programs.compilation import compiled_chunks
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.engine.settings.options import PrefillOptions, PrefillSettings, options_of
from mmi_jax.engine.settings.request import PrefillRequest, request_for
from mmi_jax.layout import text_tokens


def prepare(
    model: VisionLanguageModel,
    lengths: Sequence[int],
    *,
    batch: int = 1,
    options: PrefillOptions | None = None,
    **settings: Unpack[PrefillSettings],
) -> list[int]:
    """Compiles what `prefill` with these settings runs for prompts of these lengths, and gives their buckets.

    A bucket is a padded length, and any prompt that is padded to it finds its programs. All programs are compiled side
    by side on all cores; JAX's compilation cache on disk is read and filled where there is one. A cache of each length
    is allocated on the device for a moment.

    What `model.embed` compiles, a vision tower above all, belongs to the model: embed a prompt to warm it up. Neither
    is the small program of `logits_at` compiled, nor those over a cache that is continued.

    Args:
      model: as for `prefill`.
      lengths: tokens of the prompts, any number in a bucket; all of `Buckets().lengths()` are many.
      batch: prompts that will run together.
      options: the settings, as for `prefill`.
      **settings: fields of `PrefillOptions` in place of those of `options`.

    Returns:
      The buckets, ascending; tokens.

    Raises:
      ValueError: a length or a setting that `prefill` would refuse, or a mesh.
      DoesNotFitError: the device's memory is known and too small for the longest of them.
    """
    if not isinstance(lengths, Iterable) or isinstance(lengths, str):
        raise ValueError(f"lengths must be numbers of tokens, as in [{lengths!r}], got {lengths!r}")
    options = options_of(options, settings)
    if options.mesh is not None:
        raise ValueError("prepare compiles for one device: expected no mesh")
    requests = [request_for(model.config, num_tokens, options, batch=batch) for num_tokens in lengths]
    of_lengths = {each.lengths: each for request in requests for each in _of_bucket(request)}
    prepare_requests(model, of_lengths.values())
    return sorted({request.buckets.length_for(request.num_tokens) for request in requests})


def prepare_requests(model: VisionLanguageModel, requests: Iterable[PrefillRequest]) -> None:
    """Compiles what prefills of these requests run, of any numbers of prompts; as `prepare`."""
    longest_first = sorted(requests, key=lambda request: -request.batch * request.num_tokens)  # quick ones end the wait
    for request in longest_first[:1]:
        check_memory(memory_request(request, model, embed_bytes=0), 0)
    compiled_chunks(
        (request.program(model, position_is_index=True), chunk_shapes(model, request)) for request in longest_first
    )
    _run_the_rest(model, longest_first)


def _of_bucket(request: PrefillRequest) -> Iterator[PrefillRequest]:
    """Requests of all sizes that prompts of the same bucket have: its capacity depends on the exact length."""
    buckets, max_new_tokens = request.buckets, request.options.max_new_tokens
    padded = buckets.length_for(request.num_tokens)
    first = max((length for length in buckets.lengths() if length < padded), default=0) + 1
    last = min(padded, buckets.largest - max_new_tokens)
    for num_tokens in {*range(first, last, buckets.multiple), last} if max_new_tokens else {last}:
        yield dataclasses.replace(request, num_tokens=num_tokens)


def _run_the_rest(model: VisionLanguageModel, requests: Sequence[PrefillRequest]) -> None:
    """Runs, on nothing, what a prefill runs except its chunks and embeddings, and so compiles it."""
    from flax import nnx

    config = model.config
    sizes = dict.fromkeys((request.batch, request.lengths.capacity) for request in requests)
    for batch, capacity in sizes:  # the largest first
        cache = empty_cache(
            num_layers=config.num_layers,
            batch=batch,
            capacity=capacity,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=model.dtype,
        )
        jax.block_until_ready(cache)
        del cache
    for batch in {request.batch for request in requests}:
        hidden = jnp.zeros((batch, 1, config.embed_dim), model.dtype)
        logits = next_logits(*nnx.split(model), hidden, None)
        jax.block_until_ready((logits[:, 0], hidden[:, 0]))


def chunk_shapes(model: VisionLanguageModel, request: PrefillRequest) -> ChunkInputs[jax.ShapeDtypeStruct]:
    """The inputs of a chunk of the request on one device, as shapes; the model may be shapes, too."""
    from flax import nnx

    config, lengths, batch = model.config, request.lengths, request.batch

    def shape(*axes: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, dtype)

    kv_axes = (config.num_layers, batch, lengths.capacity, config.num_kv_heads, config.head_dim)
    cache = shape(*kv_axes, dtype=model.dtype)
    return ChunkInputs(
        state=nnx.split(model)[1],
        layer_state=nnx.split(model.layers)[1],
        rope_pos=shape(3, batch, lengths.chunk_tokens),
        layout=jax.tree.map(lambda _: shape(batch, lengths.capacity), text_tokens(1)),
        q_start=shape(),
        x=shape(batch, lengths.chunk_tokens, config.embed_dim, dtype=model.dtype),
        k=cache,
        v=cache,
        logit_places=shape(batch, 1),
        hidden=shape(batch, 1, config.embed_dim, dtype=model.dtype),
    )
