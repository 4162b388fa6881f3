"""What a prefill holds on one device, and when: its memory planned before anything is allocated."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.engine.settings.padded_lengths import Sizes, sizes_for
from mmi_jax.layout import text_tokens
from mmi_jax.method.attention import batch_geometry, permute, plan_batch
from mmi_jax.method.dense_attention import CUDNN_TOKENS
from mmi_jax.method.patterns import Dense, Pattern
from mmi_jax.sharding import ONE_DEVICE
from pallas_kernels.block_lists.block_sizes import Blocks

STAGES = ("embed", "project", "plan", "permute", "attend", "undo", "mlp", "logits")
"""A prefill in order of time; those from project to mlp are gone through once for every layer."""

LAYER = STAGES[1:-1]

PIECE_BYTES_PER_TOKEN = 6
"""Arrays as wide as an MLP or as all heads, in units of one 16-bit row, that a piece of the tokens goes through."""

ESTIMATE_ARRAYS = 4
"""Arrays of a number per key that the planning of a head that reads scores goes through."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """Something that is held on the device.

    Args:
      name: what it is.
      shape: of the array, or the axes that its bytes are counted by.
      num_bytes: all of it.
      alive: the stages in which it is held.
    """

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    alive: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The buffers of a prefill, and the most that is held of them at one time."""

    buffers: tuple[Buffer, ...]

    def at(self, stage: str) -> int:
        """Bytes held in a stage."""
        return sum(buffer.num_bytes for buffer in self.buffers if stage in buffer.alive)

    @property
    def peak_stage(self) -> str:
        """The stage in which most is held."""
        return max(STAGES, key=self.at)

    @property
    def peak(self) -> int:
        """Bytes held in that stage."""
        return self.at(self.peak_stage)

    @property
    def held_before(self) -> int:
        """Bytes of the weights, which lie on the device before the prefill begins."""
        return sum(buffer.num_bytes for buffer in self.buffers if buffer.name == "weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryTask:
    """What is to be planned.

    Args:
      config: the model's sizes.
      weight_bytes: of the whole model.
      dtype: what it computes in.
      layers: a pattern for each layer and head.
      batch: prompts that run together.
      num_tokens: of the longest.
      max_new_tokens, chunk_tokens: as for `prefill`.
      held, capacity: of a cache that is continued, which is counted by its new capacity alone.
      embed_bytes: what the model holds while it embeds images and videos, besides weights and embeddings.
    """

    config: Any
    weight_bytes: int
    dtype: Any
    layers: tuple[tuple[Pattern, ...], ...]
    batch: int
    num_tokens: int
    blocks: Blocks
    buckets: Buckets
    max_new_tokens: int = 0
    chunk_tokens: int | None = None
    held: int = 0
    capacity: int = 0
    embed_bytes: int = 0

    @property
    def sizes(self) -> Sizes:
        """Padded lengths, as `prefill` chooses them."""
        return sizes_for(
            self.num_tokens,
            max_new_tokens=self.max_new_tokens,
            chunk_tokens=self.chunk_tokens,
            buckets=self.buckets,
            blocks=self.blocks,
            shards=ONE_DEVICE,
            held=self.held,
            capacity=self.capacity,
        )


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of the arrays that its shapes stand for."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def plan_memory(task: MemoryTask) -> MemoryPlan:
    """The buffers of the layer that needs most, and those around it.

    Raises:
      ValueError: the prompt or the sizes do not fit the buckets.
    """
    sizes = task.sizes
    plans = [MemoryPlan(buffers=tuple(_buffers(task, sizes, row))) for row in dict.fromkeys(task.layers)]
    return max(plans, key=lambda plan: plan.peak)


def _buffers(task: MemoryTask, sizes: Sizes, row: tuple[Pattern, ...]) -> Iterator[Buffer]:
    config, width = task.config, jnp.dtype(task.dtype).itemsize
    b, t, s = task.batch, sizes.chunk, sizes.capacity
    h, g, d, e = config.num_heads, config.num_kv_heads, config.head_dim, config.embed_dim

    def array(name: str, alive: tuple[str, ...], *shape: int, item: int = width) -> Buffer:
        return Buffer(name=name, shape=shape, num_bytes=item * math.prod(shape), alive=alive)

    yield Buffer(name="weights", shape=(), num_bytes=task.weight_bytes, alive=STAGES)
    yield Buffer(name="vision tower's batches", shape=(), num_bytes=task.embed_bytes, alive=STAGES[:1])
    yield array("cache: keys and values", STAGES[1:], 2, config.num_layers, b, s, g, d)
    if t < sizes.padded:
        yield array("embeddings of all chunks", STAGES[:-1], b, sizes.padded, e)
    yield array("x, embeddings and then every layer's output", STAGES[:-1], b, t, e)
    yield array("rotary cosines and sines, float32", LAYER, 2, b, t, d, item=4)
    layer_dim = e * (2 * h * d + 2 * g * d + 3 * config.mlp_dim)
    yield array("weights of the layer that runs", LAYER, layer_dim)
    piece = PIECE_BYTES_PER_TOKEN * b * min(t, 8192)
    yield array("a piece of the projections", ("project",), piece, h * d)
    yield array("a piece of the MLP", ("mlp",), piece // 2, config.mlp_dim)
    yield array("q", ("project", "plan", "permute"), b, t, h, d)
    yield array("new keys and values", ("project",), 2, b, t, g, d)
    yield from _attention_buffers(task, sizes, row, array)
    yield array("attention output in token order", ("undo", "mlp"), b, t, h, d)
    yield array("logits, float32", ("logits",), b, config.vocab_size, item=4)


def _attention_buffers(task: MemoryTask, sizes: Sizes, row: tuple[Pattern, ...], array) -> Iterator[Buffer]:
    """What planning, permuting and attending hold."""
    config, b, t = task.config, task.batch, sizes.chunk
    h, g, d = config.num_heads, config.num_kv_heads, config.head_dim
    if sizes.is_whole and set(row) == {Dense()} and t <= CUDNN_TOKENS:  # no plan where a vendor's kernel takes over
        yield array("keys and values without padding", ("attend",), 2, b, t, g, d)
        yield array("attention output", ("attend", "undo"), b, t, h, d)
        return
    inputs = _attention_shapes(row, b, t, sizes.capacity, h, g, d, jnp.dtype(task.dtype), task.blocks)
    reading = sum(pattern.reads_scores for pattern in row)
    yield array("masses of estimates, float32", ("plan",), ESTIMATE_ARRAYS, b, reading, sizes.capacity, item=4)
    yield array("queries in permuted order", ("permute", "attend"), *inputs.q.shape)
    keys = bytes_of((inputs.k, inputs.v))
    yield Buffer(name="key and value views", shape=inputs.k.shape, num_bytes=keys, alive=("permute", "attend"))
    extra = bytes_of((inputs.k_extra, inputs.v_extra))
    yield Buffer(name="gathered columns", shape=inputs.k_extra.shape, num_bytes=extra, alive=("permute", "attend"))
    lists = bytes_of((inputs.index, inputs.q_pos, inputs.kv_pos))
    alive = ("plan", "permute", "attend", "undo")
    yield Buffer(name="block lists and positions", shape=inputs.index.start.shape, num_bytes=lists, alive=alive)
    yield Buffer(name="output in permuted order", shape=inputs.q.shape, num_bytes=bytes_of(inputs.q), alive=alive[2:])


@functools.lru_cache(maxsize=64)
def _attention_shapes(row: tuple[Pattern, ...], b: int, t: int, s: int, h: int, g: int, d: int, dtype, blocks: Blocks):
    """The kernel's arguments for `t` queries over `s` keys, as shapes: what the engine's own code makes of them."""
    layout = jax.tree.map(lambda _: jax.ShapeDtypeStruct((b, s), jnp.int32), text_tokens(1))
    q, k = (jax.ShapeDtypeStruct((b, n, heads, d), dtype) for n, heads in ((t, h), (s, g)))

    def inputs(q, k, v, layout):
        geometry = batch_geometry(layout, row, batch=b, num_queries=t, q_start=jnp.int32(0), blocks=blocks)
        return permute(plan_batch(row, q, k, geometry, scale=1.0, blocks=blocks), q, k, v, scale=1.0)

    return jax.eval_shape(inputs, q, k, k, layout)
