"""The programs of one chunk of tokens, one for each different layer: on one device, or on a mesh."""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from mmi_jax.engine.programs.single_layer import run_layer
from mmi_jax.engine.reporting.stages import Stage
from mmi_jax.layout import PADDING, TokenLayout
from mmi_jax.method import estimate
from mmi_jax.method.dispatch import SparseAttention, Vendor, attend_sparsely
from mmi_jax.method.kv_views import AllKeys
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.plan import batch_geometry
from mmi_jax.sharding import (
    CACHE_SPEC,
    PER_DEVICE_SPEC,
    ROPE_SPEC,
    TOKENS_SPEC,
    Shards,
    layer_specs,
    shards_of,
    split_axes,
    weight_specs,
)
from pallas_kernels.attention.api import Backend
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Array

NUM_RECALL_QUERIES = 64
"""Queries, evenly spaced over the prompt, whose recall is measured against dense attention: enough for a mean over
heads and prompts, and `64 / t` of dense attention's cost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Everything the compiled parts of a chunk depend on except shapes.

    A chunk runs as `start`, then `layer` after layer, then `end`, without the host waiting for any of them. All layers
    with the same patterns are one compiled program, whose layer number is an argument, so what is compiled grows with
    the number of different layers, and different layers can be compiled side by side.

    Args:
      graphdef, layer_graphdef: of the model, and of its `layers`.
      layers: a pattern for each layer and query head.
      implementation: see `block_sparse_attention`.
      measures_recall: estimate the fraction of attention that was kept.
      position_is_index: see `attend_sparsely`.
      mesh: splits the chunk, which is then the whole prompt; None for one device.
    """

    graphdef: Any
    layer_graphdef: Any
    layers: tuple[tuple[Pattern, ...], ...]
    blocks: Blocks
    implementation: Backend | Vendor | None = None
    measures_recall: bool = True
    position_is_index: bool = False
    mesh: Mesh | None = None

    def of(self, *rows: tuple[Pattern, ...]) -> "Program":
        """The same program for other layers."""
        return dataclasses.replace(self, layers=rows)

    @property
    def rows(self) -> tuple[tuple[Pattern, ...], ...]:
        """The different layers: each is a program."""
        return tuple(dict.fromkeys(self.layers))

    def geometry_rows(self, shards: Shards) -> dict[Hashable, tuple[Pattern, ...]]:
        """One layer for each different geometry that the layers need, by the views of it."""
        return {self._views(row, shards): row for row in self.rows}

    def geometry_of(self, row: tuple[Pattern, ...], shards: Shards, geometries):
        """The layer's geometry among those that `start` made."""
        return geometries[list(self.geometry_rows(shards)).index(self._views(row, shards))]

    def _views(self, row: tuple[Pattern, ...], shards: Shards):
        return tuple(
            tuple(dict.fromkeys(view for pattern in group for view in pattern.views(AllKeys(), self.blocks)))
            for group in shards.per_group(row)
        )

    def start(self, state: PyTree, num_kv_heads: int):
        """`(state, rope_pos, layout, q_start) -> rotary, geometries`, which all layers read."""
        shards = shards_of(self.mesh, num_kv_heads=num_kv_heads)
        rows = tuple(self.geometry_rows(shards).values())

        def prefill_start(*args):
            return _start(self, rows, shards, *args)

        return self._jit(prefill_start, (weight_specs(state, shards), ROPE_SPEC, P(), P()), PER_DEVICE_SPEC)

    def layer(self, weights: PyTree, num_kv_heads: int):
        """`(weights, n, shared, layout, q_start, x, k, v) -> x, k, v, statistics` for layers of the only row.

        x, k and v are donated: the results lie in their memory.

        Args:
          weights: state of `model.layers`, arrays or shapes; it says how the weights are split.
        """
        (row,) = self.layers
        shards = shards_of(self.mesh, num_kv_heads=num_kv_heads)
        axes = split_axes(weights, shards)

        def prefill_layer(*args):
            return _layer(self, row, shards, axes, *args)

        carry_specs = (TOKENS_SPEC, CACHE_SPEC, CACHE_SPEC)
        in_specs = (layer_specs(weights, axes), P(), PER_DEVICE_SPEC, P(), P(), *carry_specs)
        return self._jit(prefill_layer, in_specs, (*carry_specs, P()), donate_argnums=(5, 6, 7))

    def end(self, num_kv_heads: int):
        """`(x, logit_places, q_start, hidden) -> hidden`, with those of this chunk filled in."""
        shards = shards_of(self.mesh, num_kv_heads=num_kv_heads)

        def prefill_end(*args):
            return _hidden_at(shards, *args)

        return self._jit(prefill_end, (TOKENS_SPEC, P(), P(), P()), P())

    def _jit(self, run, in_specs, out_specs, **options):
        if self.mesh is not None:
            sharded = jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            run = functools.wraps(run)(lambda *args: sharded(*args))
        return jax.jit(run, keep_unused=True, **options)


def _start(program: Program, rows, shards: Shards, state, rope_pos, layout: TokenLayout, q_start):
    """Inputs of all layers: what they rotate by, and for each of the rows the geometry of each group of heads."""
    from flax import nnx

    model: Any = nnx.merge(program.graphdef, state)
    num_queries = rope_pos.shape[2] * shards.heads
    first_query = shards.first_query(q_start, num_queries)

    def geometry(patterns):
        return batch_geometry(
            layout,
            patterns,
            batch=rope_pos.shape[1],
            num_queries=num_queries,
            q_start=first_query,
            blocks=program.blocks,
        )

    return model.rotary(rope_pos), tuple(tuple(map(geometry, shards.per_group(row))) for row in rows)


def _layer(
    program: Program,
    row: tuple[Pattern, ...],
    shards: Shards,
    axes: tuple[int | None, ...],
    weights,
    n,
    shared,
    layout: TokenLayout,
    q_start,
    x,
    k,
    v,
):
    """Layer `n` over one chunk of tokens, or over this device's piece of the prompt.

    Args:
      weights: of all layers, leading axis the layers.
      shared: what the layers rotate by, and the geometry of each group of heads of the row.
      layout, q_start: of the whole prompt.
      x, k, v: this device's hidden states and its caches of all layers.

    Returns:
      The layer's output, the caches, and its statistics on every device: density and recall `[pieces, 1, b, h]`, the
      queries behind the recall and whether q and k were finite `[pieces, 1, b]`.
    """

    rotary, geometries = shared
    attend_heads = _attention(program, shards, row, geometries, x, layout, q_start)
    own_weights = shards.whole(jax.tree.map(lambda a: a[n], weights), axes)

    def attend(q, k_new, v_new):
        q, k_new, v_new = (shards.by_heads(new) for new in (q, k_new, v_new))
        at = q_start if shards.num_devices == 1 else 0
        k_all, v_all = (
            jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), (n, 0, at, 0, 0))
            for cache, new in ((k, k_new), (v, v_new))
        )
        out, statistics = attend_heads(q, shards.all_tokens(k_all[n]), shards.all_tokens(v_all[n]))
        return shards.by_tokens(out), (k_all, v_all, statistics)

    x, (k, v, statistics) = run_layer(program.layer_graphdef, own_weights, x, rotary, attend)
    return x, k, v, _join(shards, jax.tree.map(lambda a: a[None], statistics))


def _attention(program: Program, shards: Shards, row: tuple[Pattern, ...], geometries, x, layout: TokenLayout, q_start):
    """`(q, k, v) -> (out, statistics)` for the queries and heads of this device."""
    first_query = shards.first_query(q_start, x.shape[1] * shards.heads)

    def of_group(patterns, geometry):
        def attend(q, k, v):
            # Before q is permuted, so that it need not be kept until all is done.
            q, sample = jax.lax.optimization_barrier((q, _sample(program, q, k, layout, first_query)))
            result = attend_sparsely(
                q,
                k,
                v,
                patterns,
                layout=layout,
                geometry=geometry,
                q_start=first_query,
                blocks=program.blocks,
                implementation=program.implementation,
                position_is_index=program.position_is_index,
                padding_is_finite=True,  # prefill pads with tokens, whose embeddings are finite
            )
            return result.out, _statistics(program, result, sample)

        return attend

    branches = [of_group(*group) for group in zip(shards.per_group(row), geometries, strict=True)]
    return lambda q, k, v: shards.in_group(branches, q, k, v)


def _hidden_at(shards: Shards, x, logit_places, q_start, hidden):
    """The hidden states at these places: those that lie in this chunk, and the others as they were."""
    place = logit_places - shards.first_token(q_start, x.shape[1])
    is_here = ((place >= 0) & (place < x.shape[1]))[..., None]
    rows = jnp.take_along_axis(x, jnp.clip(place, 0, x.shape[1] - 1)[..., None], axis=1)
    if shards.num_devices == 1:
        return jnp.where(is_here, rows, hidden)
    return shards.sum(jnp.where(is_here, rows, jnp.zeros_like(rows)))  # one device holds each


def _join(shards: Shards, statistics):
    """Statistics of all pieces and heads, the same on every device."""
    is_finite = shards.everywhere(statistics["is_finite"])
    per_piece = {name: shards.by_piece(statistics[name], has_heads=True) for name in ("density", "recall")}
    others = {"num_queries": statistics["num_queries"], "is_finite": is_finite}
    return per_piece | {name: shards.by_piece(x, has_heads=False) for name, x in others.items()}


def _sample(program: Program, q, k, layout: TokenLayout, q_start) -> dict[str, Array]:
    """Figures of all of q and k: whether they are finite `[b]`, and queries spaced evenly over the prompt.

    Of the queries: their rows `[b, n]`, whether they are real, and each head's log-sum-exp over all keys `[b, h, n]`.
    """
    queries = layout.window(q_start, q.shape[1])
    is_finite = jnp.array(
        [
            jnp.all(jnp.where(layout_part.is_real[..., None, None], jnp.isfinite(x), True), axis=(1, 2, 3))
            for x, layout_part in ((q, queries), (k, layout))
        ]
    ).all(axis=0)
    sample = {"num_queries": queries.is_real.sum(axis=1), "is_finite": is_finite}
    if not program.measures_recall:
        return sample
    with jax.named_scope(Stage.RECALL.scope):
        rows, is_real, lse = jax.vmap(_dense_lse)(q, k, queries, layout)
    return sample | {"rows": rows, "is_real": is_real, "lse": lse}


def _dense_lse(q, k, queries: TokenLayout, keys: TokenLayout):
    """Rows of evenly spaced queries, whether they are real, and each head's log-sum-exp over all keys; one example."""
    num_real = queries.is_real.sum()
    rows = ((jnp.arange(NUM_RECALL_QUERIES) + 0.5) * num_real / NUM_RECALL_QUERIES).astype(jnp.int32)
    q_pos = jnp.where(queries.is_real, queries.pos, PADDING)[rows]
    kv_pos = jnp.where(keys.is_real, keys.pos, jnp.iinfo(jnp.int32).max)
    ratio, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    q = q[rows]

    def head(h):
        return estimate.dense_lse(q[:, h], k[:, h // ratio], q_pos, kv_pos, scale)

    return rows, q_pos >= 0, jax.lax.map(head, jnp.arange(q.shape[1]))


def _statistics(program: Program, result: SparseAttention, sample: dict[str, Array]):
    """Density and recall of each head, `[b, h]`, the queries behind the recall `[b]`, and whether q, k are finite.

    Recall is the mean over the sampled queries of the fraction of attention that was kept.
    """
    density = result.density()
    if not program.measures_recall:
        recall = jnp.full(density.shape, jnp.nan)
    elif result.plan is None:  # nothing was left out, and its log-sum-exp is rounded
        recall = jnp.ones_like(density)
    else:
        sparse = jnp.take_along_axis(result.lse, sample["rows"][:, None], axis=2)
        dense = jnp.where(jnp.isfinite(sample["lse"]), sample["lse"], 0.0)
        recall = jnp.mean(jnp.exp(sparse - dense), axis=2, where=sample["is_real"][:, None])
    return {name: sample[name] for name in ("num_queries", "is_finite")} | {"density": density, "recall": recall}
