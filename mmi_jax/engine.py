"""prefill: a prompt through all layers of a model in one compiled program per bucket."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from mmi_jax.blocks import Blocks
from mmi_jax.buckets import MOST_TOKENS, Buckets
from mmi_jax.cache import KVCache, empty_cache
from mmi_jax.cost import costs_of_device, faster_patterns
from mmi_jax.layout import TokenLayout
from mmi_jax.patterns import Dense, Pattern
from mmi_jax.plain import is_plain
from mmi_jax.program import Program
from mmi_jax.report import PrefillReport
from mmi_jax.sharding import CACHE_SPEC, ROPE_SPEC, TOKENS_SPEC, Shards, place, shards_of, weight_specs
from mmi_jax.table import PatternTable, uniform_table
from pallas_kernels.attention.api import Implementation
from pallas_kernels.notation import AnyArray, Array, Float
from pallas_kernels.pytree import pytree


@runtime_checkable
class ModelConfig(Protocol):
    """The sizes that prefill reads of a model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@runtime_checkable
class VisionLanguageModel(Protocol):
    """What prefill asks of a model: an `nnx.Module` whose `layers` carry a leading layer axis.

    A layer is called as `layer(x, rotary, attend) -> (x, aux)`, where `attend(q, k, v) -> (out, aux)` takes
    `[b, t, h, d]` and `[b, t, g, d]` after rotation.
    """

    config: Any
    layers: Any
    embedding: Callable[..., Any]

    def embed(self, prompt: Any) -> Any:
        """Embeddings `[b, t, e]` of the tokens, vision included."""
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
    logits_at: Int[AnyArray, "b n"] | None = None,
    buckets: Buckets | None = None,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
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
      max_new_tokens: room to leave in the cache for decoding.
      logits_at: tokens of each prompt, anywhere in it, after which next-token logits are wanted besides those after the
        last; in `PrefillResult.logits_at`. Their number `n` is a size of the compiled program, their places are not.
      buckets: padded lengths.
      blocks: tile sizes.
      implementation: see `block_sparse_attention`.
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
    """
    from flax import nnx  # here, so that attention and its benchmarks need no flax

    blocks = blocks or Blocks()
    table = _as_table(table, model.config)
    shards = shards_of(mesh, num_kv_heads=model.config.num_kv_heads)
    buckets = buckets or default_buckets(blocks, shards)
    lengths = _lengths(prompt)
    wanted = _wanted(lengths, logits_at)
    num_tokens, chunk, capacity = _sizes(int(lengths.max()), max_new_tokens, chunk_tokens, buckets, blocks, shards)
    if may_run_dense and chunk >= num_tokens:
        table = _faster(table, num_tokens, blocks)
    clock = _Clock(on_stage)
    with clock("vision"):
        x = jax.block_until_ready(_fit(model.embed(prompt), capacity, axis=1))
    layout = jax.tree.map(jnp.asarray, _fit_layout(prompt.layout, capacity))
    rope_pos = _fit(jnp.asarray(prompt.rope_pos), capacity, axis=2)
    graphdef, state = nnx.split(model)
    program = Program(
        graphdef=graphdef,
        layers=table.layers,
        blocks=blocks,
        implementation=implementation,
        measures_recall=measures_recall,
        starts_plain=chunk >= num_tokens and shards.num_devices == 1 and is_plain(prompt.layout),
        mesh=mesh,
    )
    filled = _described_cache(model.config, x, layout, rope_pos, lengths, mesh)
    state = place(state, mesh, weight_specs(state, shards))
    x, rope_pos = place(x, mesh, TOKENS_SPEC), place(rope_pos, mesh, ROPE_SPEC)
    starts = range(0, num_tokens, chunk)
    cache, hidden, statistics = _run_chunks(program, state, x, rope_pos, filled, wanted, starts, clock)
    _check_finite(statistics, np.asarray(hidden))
    report = PrefillReport.build(
        layout=prompt.layout, table=table, padded_tokens=capacity, seconds=clock.seconds, statistics=statistics
    )
    logits = _logits(graphdef, state, hidden, mesh)
    return PrefillResult(
        logits=logits[:, 0],
        logits_at=None if logits_at is None else logits[:, 1:],
        hidden=hidden[:, 0],
        cache=cache,
        report=report,
    )


def _described_cache(
    config: ModelConfig, x, layout: TokenLayout, rope_pos, lengths: np.ndarray, mesh: Mesh | None
) -> KVCache:
    """A cache with room for the padded prompts that knows all of them but their keys and values."""
    cache = empty_cache(
        num_layers=config.num_layers,
        batch=x.shape[0],
        capacity=x.shape[1],
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=x.dtype,
        sharding=None if mesh is None else NamedSharding(mesh, CACHE_SPEC),
    )
    return dataclasses.replace(
        cache,
        layout=place(layout, mesh, P()),
        lengths=place(jnp.asarray(lengths, jnp.int32), mesh, P()),
        next_rope_pos=jnp.max(jnp.where(layout.is_real, rope_pos, -1), axis=(0, 2)) + 1,
    )


def _run_chunks(program: Program, state, x, rope_pos, cache: KVCache, wanted, starts: range, clock: "_Clock"):
    """All chunks one after another: the cache with its keys and values, the wanted hidden states, and statistics."""
    hidden = place(jnp.zeros((*wanted.shape, x.shape[2]), x.dtype), program.mesh, P())
    wanted = place(jnp.asarray(wanted, jnp.int32), program.mesh, P())
    carry = cache.k, cache.v, hidden
    statistics = []
    for start in starts:
        tokens = slice(start, start + starts.step)
        q_start = place(jnp.int32(start), program.mesh, P())
        args = (state, x[:, tokens], rope_pos[:, :, tokens], cache.layout, q_start, wanted, carry)
        with clock("compile"):
            compiled = _compiled(program, *args)
        with clock("prefill"):
            carry, chunk_statistics = jax.block_until_ready(compiled(*args))
        pieces = jax.device_get(chunk_statistics)
        statistics += [jax.tree.map(lambda a, n=n: a[n], pieces) for n in range(len(pieces["num_queries"]))]
    k, v, hidden = carry
    return dataclasses.replace(cache, k=k, v=v), hidden, statistics


def _logits(graphdef, state, hidden, mesh: Mesh | None):
    """Float32 logits `[b, n, v]`, on every device of a mesh."""
    from flax import nnx

    if mesh is None:
        return nnx.merge(graphdef, state).unembed(hidden)
    unembed = jax.jit(lambda state, x: nnx.merge(graphdef, state).unembed(x), out_shardings=NamedSharding(mesh, P()))
    return unembed(state, hidden)


def num_compiled_programs() -> int:
    """Programs that prefill has compiled in this process."""
    return len(_COMPILED)


_COMPILED: dict[Any, Any] = {}


def _compiled(program: Program, *args):
    """The chunk's program for arguments of these shapes, compiled at most once."""
    signature = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    leaves, tree = jax.tree.flatten(signature)
    key = (program, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    if key not in _COMPILED:
        num_kv_heads = args[-1][0].shape[3]
        _COMPILED[key] = program.jitted(args[0], num_kv_heads).lower(*args).compile()
    return _COMPILED[key]


def _as_table(table: PatternTable | Pattern | None, config: ModelConfig) -> PatternTable:
    if table is None or isinstance(table, Pattern):
        return uniform_table(table or Dense(), num_layers=config.num_layers, num_heads=config.num_heads)
    table.check_fits(num_layers=config.num_layers, num_heads=config.num_heads)
    return table


def _faster(table: PatternTable, num_tokens: int, blocks: Blocks) -> PatternTable:
    """The table with dense heads where the device's cost model finds them faster."""
    costs = costs_of_device()
    layers = tuple(faster_patterns(row, num_tokens=num_tokens, blocks=blocks, costs=costs) for row in table.layers)
    return dataclasses.replace(table, layers=layers)


def default_buckets(blocks: Blocks, shards: Shards) -> Buckets:
    """Padded lengths that every device's piece fills with whole blocks.

    A mesh takes prompts of up to `MOST_TOKENS`, as many as `mmi aot --longest` tries; one device those of `Buckets()`.
    """
    if shards.num_devices == 1:
        return Buckets()
    multiple = math.lcm(blocks.q, blocks.kv) * shards.num_devices
    return Buckets(smallest=multiple, largest=-(-MOST_TOKENS // multiple) * multiple, multiple=multiple)


def _sizes(
    num_tokens: int, max_new_tokens: int, chunk_tokens: int | None, buckets: Buckets, blocks: Blocks, shards: Shards
) -> tuple[int, int, int]:
    """Tokens to run, in whole chunks; tokens of a chunk; and capacity of the cache."""
    padded = buckets.length_for(num_tokens)
    piece = buckets.multiple / shards.num_devices
    if piece % blocks.q or piece % blocks.kv:
        pieces = f"{shards.num_devices} times {blocks}" if shards.num_devices > 1 else f"{blocks}"
        raise ValueError(f"buckets must be whole numbers of blocks: {buckets.multiple=} must be a multiple of {pieces}")
    if shards.num_devices > 1 and chunk_tokens is not None:
        raise ValueError(f"a mesh runs the whole prompt at once: expected no chunk_tokens, got {chunk_tokens}")
    chunk = padded if chunk_tokens is None else chunk_tokens
    if chunk < 1 or chunk % blocks.q or chunk % blocks.kv:
        raise ValueError(f"chunk_tokens must be a positive multiple of the block sizes {blocks}, got {chunk_tokens}")
    if not 0 <= max_new_tokens <= buckets.largest - num_tokens:
        raise ValueError(
            f"max_new_tokens must be at least 0 and fit the largest bucket with the prompt: "
            f"{buckets.largest=}, {num_tokens=}, {max_new_tokens=}"
        )
    if shards.num_devices > 1:  # the cache is cut as the prompt is, so the room behind it runs along as padding
        chunk = buckets.length_for(num_tokens + max_new_tokens)
    whole = -(-num_tokens // chunk) * chunk
    return whole, chunk, max(whole, buckets.length_for(num_tokens + max_new_tokens))


def _fit(x, num_tokens: int, *, axis: int):
    """The array cut or padded with zeros to `num_tokens` along an axis."""
    x = jax.lax.slice_in_dim(x, 0, min(num_tokens, x.shape[axis]), axis=axis)
    return jnp.pad(x, [(0, num_tokens - x.shape[axis] if n == axis else 0) for n in range(x.ndim)])


def _fit_layout(layout: TokenLayout, num_tokens: int) -> TokenLayout:
    cut = jax.tree.map(lambda x: x[:, :num_tokens], layout)
    return cut.pad_to(num_tokens)


def _lengths(prompt: Any) -> np.ndarray:
    """Tokens of each prompt; raises ValueError for a batch that cannot be run."""
    is_real = np.asarray(prompt.layout.is_real)
    if is_real.ndim != 2:
        raise ValueError(f"the layout's fields must be [b, t], got shape {is_real.shape}")
    lengths = is_real.sum(axis=1)
    if not len(lengths) or lengths.min() < 1:
        raise ValueError(f"every prompt of a batch must have at least one token, got lengths {lengths.tolist()}")
    if (is_real != (np.arange(is_real.shape[1]) < lengths[:, None])).any():
        raise ValueError("prompts of a batch must be padded on the right only, got padding before a token")
    if prompt.tokens.shape != is_real.shape or prompt.rope_pos.shape != (3, *is_real.shape):
        raise ValueError(
            f"tokens and rope_pos must fit the layout {is_real.shape}: "
            f"got {prompt.tokens.shape} and {prompt.rope_pos.shape}"
        )
    return lengths


def _wanted(lengths: np.ndarray, logits_at: Any) -> np.ndarray:
    """Tokens whose hidden states are wanted, `[b, 1 + n]`: each prompt's last, then those of `logits_at`."""
    last = lengths[:, None] - 1
    if logits_at is None:
        return last
    asked = np.asarray(logits_at)
    if asked.ndim != 2 or asked.shape[0] != len(lengths) or not np.issubdtype(asked.dtype, np.integer):
        raise ValueError(
            f"logits_at must be integers [b, n] with one row for each of the {len(lengths)} prompts: "
            f"got {asked.dtype} {asked.shape}"
        )
    if ((asked < 0) | (asked > last)).any():
        example, n = np.argwhere((asked < 0) | (asked > last))[0]
        raise ValueError(
            f"logits_at must name tokens of the prompt: prompt {example} has {lengths[example]}, "
            f"got token {asked[example, n]}"
        )
    return np.concatenate([last, asked], axis=1)


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
