"""Ahead-of-time compilation for a topology that is not attached: from shapes alone, and what the compiler reports of
their memory.
"""

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import PyTree

from mmi_jax.engine.programs.chunk_inputs import ChunkInputs
from mmi_jax.engine.programs.compilation import layer_arguments
from mmi_jax.engine.programs.layer_program import Program
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.engine.settings.buckets import Buckets, default_buckets
from mmi_jax.layout import TokenLayout, text_tokens
from mmi_jax.method.attention import permute
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.plan import batch_geometry, plan_batch
from mmi_jax.method.tables.pattern_table import PatternTable
from mmi_jax.sharding import CACHE_SPEC, ROPE_SPEC, TOKENS_SPEC, Shards, shards_of, weight_specs
from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.attention.tpu import mosaic_tpu
from pallas_kernels.attention.tpu.tpu_config import TpuConfig
from pallas_kernels.block_lists.block_sizes import Blocks

KERNEL = "block_sparse_attention"
"""Name of the TPU kernel in the compiler's files."""

_DOES_NOT_FIT = re.compile(
    r"(?:Used (?P<used>[\d.]+[KMG]) of|HLO temporaries \((?P<early>[\d.]+[KMG])\) exceeds available HBM) "
    r"\(?(?P<limit>[\d.]+[KMG])\)?"
)
"""The compiler's message for a program that does not fit: after it has assigned memory, or before."""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory that a program needs on each device; bytes.

    Args:
      arguments: weights, embeddings, positions, and the cache that becomes the result.
      total: all that the program allocates, arguments included; of one that does not fit, what the compiler came to.
      limit: what the compiler may use, None where it did not say so.
      compile_seconds: tracing and lowering included.
    """

    arguments: int
    total: int
    limit: int | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the program compiled."""
        return self.limit is None


@dataclasses.dataclass(frozen=True)
class TpuAttention:
    """The TPU kernel as it runs on devices of a kind that is not attached: a backend for `Program.implementation`."""

    device_kind: str

    def config(self, inputs: AttentionInputs) -> TpuConfig:
        """The tile sizes there."""
        return mosaic_tpu.choose_config(inputs, self.device_kind)

    def __call__(self, inputs: AttentionInputs):
        """Output and log-sum-exp, as of `block_sparse_attention`."""
        return mosaic_tpu.launch(inputs, self.config(inputs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Model, settings and topology that a prefill is compiled for.

    Args:
      model: with shapes in place of arrays.
      table: a pattern for each layer and head.
      mesh: of devices of a topology.
      blocks: tile sizes.
      measures_recall: as in `prefill`.
    """

    model: VisionLanguageModel
    table: PatternTable
    mesh: Mesh
    blocks: Blocks
    measures_recall: bool = True

    @property
    def shards(self) -> Shards:
        """The split of the model over the mesh."""
        return shards_of(self.mesh, num_kv_heads=self.model.config.num_kv_heads)

    @property
    def dtype(self) -> DTypeLike:
        """The dtype that the model computes in."""
        return self.model.dtype

    @property
    def attention(self) -> TpuAttention:
        """The kernel on the mesh's devices."""
        return TpuAttention(self.mesh.devices.flat[0].device_kind)

    def buckets(self, largest: int) -> Buckets:
        """The padded lengths up to `largest` tokens, which may be more than prefill takes without other buckets."""
        usual = default_buckets(self.blocks, self.shards)
        return dataclasses.replace(usual, largest=max(usual.smallest, largest // usual.multiple * usual.multiple))


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology such as `v5e:4x4`.

    Raises:
      ValueError: there is no such topology, or the TPU compiler is not installed.
    """
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # the plugin defines its exception types
        raise ValueError(f"the TPU compiler must know the topology: got {topology!r}: {error}") from error


def compile_prefill(target: Target, num_tokens: int) -> Memory:
    """The program that runs a prompt of `num_tokens`, a bucket's length, through all layers."""
    inputs = prefill_inputs(target, num_tokens)
    program = Program(
        graphdef=nnx.split(target.model)[0],
        layer_graphdef=nnx.split(target.model.layers)[0],
        layers=target.table.layers,
        blocks=target.blocks,
        implementation=target.attention,
        measures_recall=target.measures_recall,
        mesh=target.mesh,
    )
    start = time.perf_counter()
    memories = []
    for row, args in layer_arguments(program, inputs).items():
        jitted = program.of(row).layer(args[0], inputs.num_kv_heads)
        memories.append(_finish(jitted.trace(*args), _bytes_on_a_device(args), start))
        if not memories[-1].fits:
            break
    # What the layers do not read lies on the device all the same.
    unread = _bytes_on_a_device(inputs.state) - _bytes_on_a_device(inputs.layer_state)
    largest = max(memories, key=lambda memory: (not memory.fits, memory.total))
    return dataclasses.replace(largest, arguments=largest.arguments + unread, total=largest.total + unread)


def _bytes_on_a_device(shapes: PyTree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def prefill_inputs(target: Target, num_tokens: int) -> ChunkInputs[jax.ShapeDtypeStruct]:
    """The inputs of one prompt, as shapes with their shardings."""
    config, state = target.model.config, nnx.split(target.model)[1]

    def shape(spec, *axes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(axes, dtype, sharding=NamedSharding(target.mesh, spec))

    specs = weight_specs(state, target.shards)
    placed = jax.tree.map(lambda x, spec: shape(spec, *x.shape, dtype=x.dtype), state, specs)
    model: Any = nnx.merge(nnx.split(target.model)[0], placed)
    sizes = (config.num_layers, 1, num_tokens, config.num_kv_heads, config.head_dim)
    cache = shape(CACHE_SPEC, *sizes, dtype=target.dtype)
    return ChunkInputs(
        state=placed,
        layer_state=nnx.split(model.layers)[1],
        rope_pos=shape(ROPE_SPEC, 3, 1, num_tokens),
        layout=layout_shape(shape(P(), 1, num_tokens)),
        q_start=shape(P()),
        x=shape(TOKENS_SPEC, 1, num_tokens, config.embed_dim, dtype=target.dtype),
        k=cache,
        v=cache,
        logit_places=shape(P(), 1, 1),
        hidden=shape(P(), 1, 1, config.embed_dim, dtype=target.dtype),
    )


def layout_shape(field: jax.ShapeDtypeStruct) -> TokenLayout:
    """A layout whose fields are all like `field`."""
    return jax.tree.map(lambda _: field, text_tokens(1))


def compile_kernel(target: Target, num_tokens: int) -> dict[str, Any]:
    """The attention kernel of the first layer and group of heads alone: its tile sizes and the VMEM it needs.

    Raises:
      NotImplementedError: the kernel refuses; the message names the limit.
    """
    inputs = kernel_inputs(target, target.shards.per_group(target.table.layers[0])[0], num_tokens)
    config = target.attention.config(inputs)
    mosaic_tpu.check_supported(inputs, config)
    place = SingleDeviceSharding(target.mesh.devices.flat[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), inputs)
    jax.jit(target.attention).trace(shapes).lower(lowering_platforms=("tpu",)).compile()
    widths = mosaic_tpu.widths(target.model.config.head_dim)
    vmem_bytes = config.vmem_bytes(block_q=target.blocks.q, block_kv=target.blocks.kv, dtype=target.dtype, **widths)
    return {
        "block_q": target.blocks.q,
        "tile_kv": config.tile_kv,
        "vmem_bytes": vmem_bytes,
        "vmem_limit_bytes": config.vmem_limit_bytes,
    }


def kernel_inputs(target: Target, patterns: Sequence[Pattern], num_tokens: int) -> AttentionInputs:
    """The kernel's arguments on one device, as shapes."""
    config, shards = target.model.config, target.shards
    num_queries, num_kv_heads = num_tokens // shards.sequence, config.num_kv_heads // shards.heads
    q = jax.ShapeDtypeStruct((1, num_queries, len(patterns), config.head_dim), target.dtype)
    k = jax.ShapeDtypeStruct((1, num_tokens, num_kv_heads, config.head_dim), target.dtype)

    def plan(q, k, v, layout):
        blocks, scale = target.blocks, config.head_dim**-0.5
        geometry = batch_geometry(layout, patterns, batch=1, num_queries=num_queries, q_start=None, blocks=blocks)
        return permute(plan_batch(patterns, q, k, geometry, scale=scale, blocks=blocks), q, k, v, scale=scale)

    return jax.eval_shape(plan, q, k, k, layout_shape(jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)))


def longest_that_fits(target: Target, max_tokens: int) -> Iterator[tuple[int, Memory]]:
    """Bucket lengths and their memory as they are tried, the longest first; the longest that fitted is the answer.

    Memory grows almost linearly with the prompt, so a few lengths are guessed from the figures so far.
    """
    lengths = target.buckets(max_tokens).lengths()
    tried: dict[int, Memory] = {}
    while between := _open_lengths(lengths, tried):
        num_tokens = _next_length(between, tried)
        tried[num_tokens] = compile_prefill(target, num_tokens)
        yield num_tokens, tried[num_tokens]


def _open_lengths(lengths: list[int], tried: dict[int, Memory]) -> list[int]:
    """The lengths above the longest that fits and below the shortest that does not."""
    fits = max((n for n, memory in tried.items() if memory.fits), default=0)
    fails = min((n for n, memory in tried.items() if not memory.fits), default=lengths[-1] + 1)
    return [n for n in lengths if fits < n < fails]


def _next_length(between: list[int], tried: dict[int, Memory]) -> int:
    """The length at which the line through the nearest two figures meets the limit; after three guesses, the middle."""
    limit = next((memory.limit for memory in tried.values() if memory.limit), None)
    if limit is None:
        return between[-1]
    if len(tried) > 3:
        return between[len(between) // 2]
    near = sorted(tried, key=lambda n: min(abs(n - between[0]), abs(n - between[-1])))[:2]
    points = [(n, tried[n].total) for n in near]
    (n0, bytes0), (n1, bytes1) = sorted(points if len(points) == 2 else [(0, 0), *points])
    slope = max(bytes1 - bytes0, 1) / (n1 - n0)
    reached = [n for n in between if bytes0 + slope * (n - n0) <= limit]
    return reached[-1] if reached else between[0]


def _finish(traced: Any, arguments: int, start: float) -> Memory:
    """The traced program lowered and compiled for its TPUs."""
    lowered = traced.lower(lowering_platforms=("tpu",))
    try:
        stats = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if not (figures := _DOES_NOT_FIT.search(str(error))):
            raise
        total, limit = _bytes(figures["used"] or figures["early"]), _bytes(figures["limit"])
        seconds = time.perf_counter() - start
        return Memory(arguments=arguments, total=total, limit=limit, compile_seconds=seconds)
    return Memory(
        arguments=stats.argument_size_in_bytes,
        total=stats.total_allocation_bytes,
        limit=None,
        compile_seconds=time.perf_counter() - start,
    )


def _bytes(text: str) -> int:
    """Bytes of the compiler's `15.75G`."""
    return round(float(text[:-1]) * _UNITS[text[-1]])
