"""Ready: the programs of prefills that are to come, compiled side by side before the first prompt is there."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmi_jax.engine.kv_cache import empty_cache
from mmi_jax.engine.memory.memory_check import check_room
from mmi_jax.engine.prefill import VisionLanguageModel, next_logits
from mmi_jax.engine.programs.compilation import compiled_chunks
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.engine.settings.padded_lengths import sizes_for
from mmi_jax.engine.settings.request import Request, request_for
from mmi_jax.layout import text_tokens
from mmi_jax.method.attention import Vendor
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.tables.pattern_table import PatternTable
from mmi_jax.sharding import ONE_DEVICE
from pallas_kernels.attention.api import Backend
from pallas_kernels.block_lists.block_sizes import Blocks


def prepare(
    model: VisionLanguageModel,
    lengths: Sequence[int],
    *,
    batch: int = 1,
    table: PatternTable | Pattern | None = None,
    chunk_tokens: int | None = None,
    max_new_tokens: int = 0,
    buckets: Buckets | None = None,
    blocks: Blocks | None = None,
    implementation: Backend | Vendor | None = None,
    measures_recall: bool = True,
    may_run_dense: bool = True,
) -> list[int]:
    """Compiles what `prefill` with these settings runs for prompts of these lengths, and gives their buckets.

    A bucket is a padded length, and any prompt that is padded to it is ready. All programs are compiled side by side on
    all cores; JAX's compilation cache on disk is read and filled where there is one. A cache of each length is
    allocated on the device for a moment.

    What `model.embed` compiles, a vision tower above all, is the model's own: embed a prompt to make it ready. Neither
    is the small program of `logits_at` made, nor those over a cache that is continued.

    Args:
      model: as for `prefill`.
      lengths: tokens of the prompts, any number in a bucket; all of `Buckets().lengths()` are many.
      batch: prompts that will run together; all else is as for `prefill`.

    Returns:
      The buckets, ascending; tokens.

    Raises:
      ValueError: a length or a setting that `prefill` would refuse.
      DoesNotFitError: the device's memory is known and too small for the longest of them.
    """
    if not isinstance(lengths, Iterable) or isinstance(lengths, str):
        raise ValueError(f"lengths must be numbers of tokens, as in [{lengths!r}], got {lengths!r}")
    asked = [
        request_for(
            model.config, num_tokens, batch=batch, table=table, chunk_tokens=chunk_tokens,
            max_new_tokens=max_new_tokens, buckets=buckets, blocks=blocks, implementation=implementation,
            measures_recall=measures_recall, may_run_dense=may_run_dense,
        )
        for num_tokens in lengths
    ]  # fmt: skip
    prepare_requests(model, {each.sizes: each for one in asked for each in _of_bucket(one)}.values())
    return sorted({one.buckets.length_for(one.num_tokens) for one in asked})


def prepare_requests(model: VisionLanguageModel, requests: Iterable[Request]) -> None:
    """Compiles what prefills of these requests run, of any numbers of prompts; as `prepare`."""
    longest_first = sorted(requests, key=lambda one: -one.batch * one.num_tokens)  # the quick ones end the wait
    for request in longest_first[:1]:
        check_room(request.memory_task(model, embed_bytes=0), 0)
    compiled_chunks((one.program(model, is_plain=True), chunk_shapes(model, one)) for one in longest_first)
    _run_the_rest(model, longest_first)


def _of_bucket(request: Request) -> Iterator[Request]:
    """Requests of all sizes that prompts of the same bucket have: room for new tokens depends on the very length."""
    buckets = request.buckets
    padded = buckets.length_for(request.num_tokens)
    first = max((length for length in buckets.lengths() if length < padded), default=0) + 1
    last = min(padded, buckets.largest - request.max_new_tokens)
    for num_tokens in {*range(first, last, buckets.multiple), last} if request.max_new_tokens else {last}:
        sizes = sizes_for(
            num_tokens, max_new_tokens=request.max_new_tokens, chunk_tokens=request.chunk_tokens, buckets=buckets,
            blocks=request.blocks, shards=ONE_DEVICE,
        )  # fmt: skip
        yield dataclasses.replace(request, num_tokens=num_tokens, sizes=sizes)


def _run_the_rest(model: VisionLanguageModel, requests: Sequence[Request]) -> None:
    """Runs, on nothing, what a prefill runs besides its chunks and embeddings, and so compiles it."""
    from flax import nnx

    config = model.config
    for batch, capacity in dict.fromkeys((one.batch, one.sizes.capacity) for one in requests):  # the largest first
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
    for batch in {one.batch for one in requests}:
        hidden = jnp.zeros((batch, 1, config.embed_dim), model.dtype)
        logits = next_logits(*nnx.split(model), hidden, None)
        jax.block_until_ready((logits[:, 0], hidden[:, 0]))


def chunk_shapes(model: Any, request: Request) -> tuple[Any, ...]:
    """What `compiled_chunk` takes for a chunk of the request on one device, as shapes; the model may be shapes, too."""
    from flax import nnx

    config, sizes, batch = model.config, request.sizes, request.batch
    states = nnx.split(model)[1], nnx.split(model.layers)[1]

    def shape(*axes: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, dtype)

    x = shape(batch, sizes.chunk, config.embed_dim, dtype=model.dtype)
    cache = shape(
        config.num_layers, batch, sizes.capacity, config.num_kv_heads, config.head_dim, dtype=model.dtype
    )  # fmt: skip
    layout = jax.tree.map(lambda _: shape(batch, sizes.capacity), text_tokens(1))
    hidden = shape(batch, 1, config.embed_dim, dtype=model.dtype)
    return states, shape(3, batch, sizes.chunk), layout, shape(), x, cache, cache, shape(batch, 1), hidden
