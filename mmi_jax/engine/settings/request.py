"""Request: what a prefill is to run, decided from lengths and settings before anything touches the device."""

import dataclasses
import operator
from typing import Any

from jax.sharding import Mesh

from mmi_jax.engine.memory.memory_check import weight_bytes
from mmi_jax.engine.memory.memory_plan import MemoryTask
from mmi_jax.engine.programs.layer_program import Program
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.engine.settings.padded_lengths import Sizes, default_buckets, sizes_for
from mmi_jax.method.attention import Vendor
from mmi_jax.method.patterns import Dense, Pattern
from mmi_jax.method.tables.cost_model import costs_of_device, faster_patterns
from mmi_jax.method.tables.pattern_table import PatternTable, as_table, uniform_table
from mmi_jax.sharding import Shards, shards_of
from pallas_kernels.attention.api import Backend
from pallas_kernels.block_lists.block_sizes import Blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What one prefill runs; fields that are not named here are those of `prefill`.

    Args:
      batch: prompts that run together.
      num_tokens: of the longest.
      held_capacity: of a cache that is continued, 0 without one; tokens.
      table: the patterns that run: some heads may have become dense.
      sizes: padded lengths.
    """

    batch: int
    num_tokens: int
    held_capacity: int
    table: PatternTable
    sizes: Sizes
    blocks: Blocks
    buckets: Buckets
    max_new_tokens: int
    chunk_tokens: int | None
    implementation: Backend | Vendor | None
    measures_recall: bool
    mesh: Mesh | None

    def shards(self, num_kv_heads: int) -> Shards:
        """How the mesh cuts it."""
        return shards_of(self.mesh, num_kv_heads=num_kv_heads)

    def program(self, model: Any, *, is_plain: bool) -> Program:
        """What its chunks run; `is_plain` as the function of that name says of the padded prompt."""
        from flax import nnx  # here, so that attention and its benchmarks need no flax

        return Program(
            graphdef=nnx.split(model)[0],
            layer_graphdef=nnx.split(model.layers)[0],
            layers=self.table.layers,
            blocks=self.blocks,
            implementation=self.implementation,
            measures_recall=self.measures_recall,
            starts_plain=is_plain and self.sizes.is_whole and self.mesh is None and _has_dense_layer(self.table),
            mesh=self.mesh,
        )

    def memory_task(self, model: Any, *, embed_bytes: int) -> MemoryTask:
        """What is to be planned; `embed_bytes` of the model for the prompt."""
        return MemoryTask(
            config=model.config,
            weight_bytes=weight_bytes(model),
            dtype=model.dtype,
            layers=self.table.layers,
            batch=self.batch,
            num_tokens=self.num_tokens,
            blocks=self.blocks,
            buckets=self.buckets,
            max_new_tokens=self.max_new_tokens,
            chunk_tokens=self.chunk_tokens,
            held=self.sizes.held,
            capacity=self.held_capacity,
            embed_bytes=embed_bytes,
        )


def request_for(
    config: Any, num_tokens: int, *, batch: int = 1, held: int = 0, held_capacity: int = 0,
    table: PatternTable | Pattern | None = None, chunk_tokens: int | None = None, max_new_tokens: int = 0,
    buckets: Buckets | None = None, blocks: Blocks | None = None,
    implementation: Backend | Vendor | None = None, measures_recall: bool = True, may_run_dense: bool = True,
    mesh: Mesh | None = None,
) -> Request:  # fmt: skip
    """The request of a prefill with these settings, those of `prefill`.

    Args:
      config: the model's sizes.
      num_tokens: of the longest prompt.
      held, held_capacity: tokens of each prompt in a cache that is continued, and its capacity.

    Raises:
      ValueError: the prompt is too long, the table is for another model, the sizes do not fit each other, or are no
        whole numbers.
    """
    num_tokens = _whole_number("num_tokens", num_tokens)
    max_new_tokens = _whole_number("max_new_tokens", max_new_tokens)
    chunk_tokens = None if chunk_tokens is None else _whole_number("chunk_tokens", chunk_tokens)
    if (batch := _whole_number("batch", batch)) < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    blocks = blocks or Blocks()
    table = as_table(table, num_layers=config.num_layers, num_heads=config.num_heads)
    shards = shards_of(mesh, num_kv_heads=config.num_kv_heads)
    buckets = buckets or default_buckets(blocks, shards)
    sizes = sizes_for(
        num_tokens,
        max_new_tokens=max_new_tokens,
        chunk_tokens=chunk_tokens,
        buckets=buckets,
        blocks=blocks,
        shards=shards,
        held=held,
        capacity=held_capacity,
    )
    return Request(
        batch=batch,
        num_tokens=num_tokens,
        held_capacity=held_capacity,
        table=_faster(table, sizes, blocks) if may_run_dense else table,
        sizes=sizes,
        blocks=blocks,
        buckets=buckets,
        max_new_tokens=max_new_tokens,
        chunk_tokens=chunk_tokens,
        implementation=implementation,
        measures_recall=measures_recall,
        mesh=mesh,
    )


def _whole_number(name: str, value: Any) -> int:
    """A whole number of any type, NumPy's too, as Python's; raises ValueError for another value."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def _faster(table: PatternTable, sizes: Sizes, blocks: Blocks) -> PatternTable:
    """The table with dense heads where the device's cost model finds them faster."""
    costs = costs_of_device()
    if not sizes.is_whole:
        is_dense = costs is not None and costs.runs_dense(table.num_heads, sizes.chunk, sizes.held + sizes.padded)
        return uniform_table(Dense(), num_layers=table.num_layers, num_heads=table.num_heads) if is_dense else table
    layers = tuple(faster_patterns(row, num_tokens=sizes.padded, blocks=blocks, costs=costs) for row in table.layers)
    return dataclasses.replace(table, layers=layers)


def _has_dense_layer(table: PatternTable) -> bool:
    """Whether a layer may run without a plan; where none may, all chunks are one program, the first too."""
    return any(set(row) == {Dense()} for row in table.layers)
