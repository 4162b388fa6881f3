"""The memory plan of a prefill on one device: its live buffers by stage, known before anything is allocated."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.engine.reporting.stages import LAYER_STAGES, MEMORY_STAGES, Stage
from mmi_jax.engine.settings.padded_lengths import PaddedLengths
from mmi_jax.engine.settings.request import PrefillRequest
from mmi_jax.layout import text_tokens
from mmi_jax.method.attention import permute
from mmi_jax.method.dispatch import CUDNN_TOKENS
from mmi_jax.method.patterns import Dense, Pattern
from mmi_jax.method.plan import batch_geometry, plan_batch
from pallas_kernels.block_lists.block_sizes import Blocks

PIECE_ARRAYS = 6
"""Arrays as wide as an MLP or as all heads, in units of one 16-bit row, that a piece of the tokens goes through.
Checked against what the compiler allocates, to within 20 %, by `tests/mmi_jax/engine/test_memory_plan.py`."""

PIECE_TOKENS = 8192
"""Tokens that the projections and the MLP of our models take at once."""

ESTIMATE_ARRAYS = 4
"""Arrays of a number per key that the planning of a head that reads scores goes through; checked as `PIECE_ARRAYS`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """An array, or several, on the device.

    Args:
      name: what it is.
      shape: of the array, or the axes that its bytes are counted by.
      num_bytes: all of it.
      live: the stages in which it is on the device.
    """

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    live: tuple[Stage, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The buffers of a prefill, and the most bytes of them that are live at one time."""

    buffers: tuple[Buffer, ...]

    def live_in(self, stage: Stage) -> tuple[Buffer, ...]:
        """The buffers of a stage, the largest first."""
        return tuple(sorted((b for b in self.buffers if stage in b.live), key=lambda b: -b.num_bytes))

    def bytes_in(self, stage: Stage) -> int:
        """Live bytes in a stage."""
        return sum(buffer.num_bytes for buffer in self.live_in(stage))

    @property
    def peak_stage(self) -> Stage:
        """The stage with the most live bytes."""
        return max(MEMORY_STAGES, key=self.bytes_in)

    @property
    def peak(self) -> int:
        """Live bytes in that stage."""
        return self.bytes_in(self.peak_stage)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, which are on the device before the prefill begins."""
        return sum(buffer.num_bytes for buffer in self.buffers if buffer.name == "weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """The prefill to plan, and the bytes of its model.

    Args:
      prefill: on one device; a cache that it continues is counted by the new capacity alone.
      weight_bytes: of the whole model.
      dtype: what it computes in.
      embed_bytes: what the model holds while it embeds images and videos, except weights and embeddings.
    """

    prefill: PrefillRequest
    weight_bytes: int
    dtype: DTypeLike
    embed_bytes: int = 0

    def with_options(self, **settings) -> "MemoryRequest":
        """The same prefill with other settings."""
        options = dataclasses.replace(self.prefill.options, **settings)
        return dataclasses.replace(self, prefill=dataclasses.replace(self.prefill, options=options))

    def with_prompts(self, *, batch: int | None = None, num_tokens: int | None = None) -> "MemoryRequest":
        """The same prefill of fewer prompts, or of shorter ones."""
        prefill = dataclasses.replace(
            self.prefill, batch=batch or self.prefill.batch, num_tokens=num_tokens or self.prefill.num_tokens
        )
        return dataclasses.replace(self, prefill=prefill)


def memory_request(prefill: PrefillRequest, model: VisionLanguageModel, *, embed_bytes: int) -> MemoryRequest:
    """The request of a prefill of `model`; `embed_bytes` of the model for the prompt."""
    return MemoryRequest(prefill=prefill, weight_bytes=weight_bytes(model), dtype=model.dtype, embed_bytes=embed_bytes)


def weight_bytes(model: VisionLanguageModel) -> int:
    """Bytes of a model's weights, arrays or shapes."""
    from flax import nnx  # here, so that attention and its benchmarks need no flax

    return bytes_of(nnx.split(model)[1])


def bytes_of(tree) -> int:
    """Bytes of all arrays of a tree, or of the arrays that its shapes stand for."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def plan_memory(request: MemoryRequest) -> MemoryPlan:
    """The buffers of the layer that needs most, and those around it.

    Raises:
      ValueError: the prompt or the sizes do not fit the buckets.
    """
    lengths = request.prefill.lengths
    around = tuple(_buffers(request, lengths))
    rows = dict.fromkeys(request.prefill.table.layers)
    plans = [MemoryPlan(buffers=(*around, *_attention_buffers(request, lengths, row))) for row in rows]
    return max(plans, key=lambda plan: plan.peak)


def _array(name: str, live: tuple[Stage, ...], *shape: int, item: int) -> Buffer:
    """One array of items of so many bytes."""
    return Buffer(name=name, shape=shape, num_bytes=item * math.prod(shape), live=live)


def _buffers(request: MemoryRequest, lengths: PaddedLengths) -> Iterator[Buffer]:
    """Buffers that are live whatever the patterns are."""
    config, array = request.prefill.config, functools.partial(_array, item=jnp.dtype(request.dtype).itemsize)
    b, t, s = request.prefill.batch, lengths.chunk_tokens, lengths.capacity
    h, g, d, e = config.num_heads, config.num_kv_heads, config.head_dim, config.embed_dim
    yield Buffer(name="weights", shape=(), num_bytes=request.weight_bytes, live=MEMORY_STAGES)
    yield Buffer(name="vision tower's batches", shape=(), num_bytes=request.embed_bytes, live=(Stage.EMBED,))
    yield array("cache: keys and values", MEMORY_STAGES[1:], 2, config.num_layers, b, s, g, d)
    if t < lengths.padded_tokens:
        yield array("embeddings of all chunks", MEMORY_STAGES[:-1], b, lengths.padded_tokens, e)
    yield array("x, embeddings and then every layer's output", MEMORY_STAGES[:-1], b, t, e)
    yield _array("rotary cosines and sines, float32", LAYER_STAGES, 2, b, t, d, item=4)
    layer_dim = e * (2 * h * d + 2 * g * d + 3 * config.mlp_dim)
    yield array("weights of the layer that runs", LAYER_STAGES, layer_dim)
    piece = PIECE_ARRAYS * b * min(t, PIECE_TOKENS)
    yield array("a piece of the projections", (Stage.PROJECT,), piece, h * d)
    yield array("a piece of the MLP", (Stage.MLP,), piece // 2, config.mlp_dim)
    yield array("q", (Stage.PROJECT, Stage.PLAN, Stage.PERMUTE), b, t, h, d)
    yield array("new keys and values", (Stage.PROJECT,), 2, b, t, g, d)
    yield array("attention output in token order", (Stage.UNDO, Stage.MLP), b, t, h, d)
    yield _array("logits, float32", (Stage.LOGITS,), b, config.vocab_size, item=4)


def _attention_buffers(request: MemoryRequest, lengths: PaddedLengths, row: tuple[Pattern, ...]) -> Iterator[Buffer]:
    """Buffers that are live while a layer plans, permutes and attends."""
    config, b, t = request.prefill.config, request.prefill.batch, lengths.chunk_tokens
    if lengths.is_whole and set(row) == {Dense()} and t <= CUDNN_TOKENS:  # a vendor's kernel, which needs no plan
        array = functools.partial(_array, item=jnp.dtype(request.dtype).itemsize)
        kv = (2, b, t, config.num_kv_heads, config.head_dim)
        yield array("keys and values without padding", (Stage.ATTEND,), *kv)
        yield array("attention output", (Stage.ATTEND, Stage.UNDO), b, t, config.num_heads, config.head_dim)
        return
    q, k = _qk_shapes(request, lengths)
    inputs = _kernel_inputs(row, q, k, request.prefill.options.block_sizes)
    num_reading = sum(pattern.reads_scores for pattern in row)
    masses = (ESTIMATE_ARRAYS, b, num_reading, lengths.capacity)
    permuted = (Stage.PERMUTE, Stage.ATTEND)
    yield _array("masses of estimates, float32", (Stage.PLAN,), *masses, item=4)
    yield _of_arrays("queries in permuted order", inputs.q.shape, permuted, inputs.q)
    yield _of_arrays("key and value views", inputs.k.shape, permuted, inputs.k, inputs.v)
    yield _of_arrays("gathered kv rows", inputs.k_extra.shape, permuted, inputs.k_extra, inputs.v_extra)
    planned = (Stage.PLAN, *permuted, Stage.UNDO)
    lists = (inputs.index, inputs.q_pos, inputs.kv_pos)
    yield _of_arrays("block lists and positions", inputs.index.start.shape, planned, *lists)
    yield _of_arrays("output in permuted order", inputs.q.shape, (Stage.ATTEND, Stage.UNDO), inputs.q)


def _of_arrays(name: str, shape: Sequence[int], live: tuple[Stage, ...], *arrays) -> Buffer:
    """The buffer of arrays that are known as shapes."""
    return Buffer(name=name, shape=tuple(shape), num_bytes=bytes_of(arrays), live=live)


def _qk_shapes(request: MemoryRequest, lengths: PaddedLengths) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """A layer's queries of a chunk and keys of the cache."""
    config, batch, dtype = request.prefill.config, request.prefill.batch, jnp.dtype(request.dtype)
    q = jax.ShapeDtypeStruct((batch, lengths.chunk_tokens, config.num_heads, config.head_dim), dtype)
    k = jax.ShapeDtypeStruct((batch, lengths.capacity, config.num_kv_heads, config.head_dim), dtype)
    return q, k


@functools.lru_cache(maxsize=64)
def _kernel_inputs(row: tuple[Pattern, ...], q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct, blocks: Blocks):
    """The kernel's arguments, as shapes: what the engine makes of a layer's queries and keys."""
    layout = jax.tree.map(lambda _: jax.ShapeDtypeStruct(k.shape[:2], jnp.int32), text_tokens(1))

    def inputs(q, k, v, layout):
        batch, num_queries = q.shape[:2]
        start = jnp.int32(0)
        geometry = batch_geometry(layout, row, batch=batch, num_queries=num_queries, q_start=start, blocks=blocks)
        return permute(plan_batch(row, q, k, geometry, scale=1.0, blocks=blocks), q, k, v, scale=1.0)

    return jax.eval_shape(inputs, q, k, k, layout)
