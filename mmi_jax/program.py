"""All layers over one chunk of tokens as one program: on one device, or cut over a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mmi_jax import estimate
from mmi_jax.attention import SparseAttention, attend_sparsely, batch_geometry
from mmi_jax.blocks import Blocks
from mmi_jax.layout import PADDING, TokenLayout
from mmi_jax.patterns import Pattern
from mmi_jax.sharding import (
    CACHE_SPEC,
    ROPE_SPEC,
    TOKENS_SPEC,
    Shards,
    layer_cuts,
    shards_of,
    weight_specs,
)
from pallas_kernels.attention.api import Backend

NUM_RECALL_QUERIES = 64
"""Queries, evenly spaced over the prompt, whose recall is measured against dense attention."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Everything a compiled chunk depends on besides shapes.

    Args:
      graphdef: of the model.
      layers: a pattern for each layer and query head.
      implementation: see `block_sparse_attention`.
      measures_recall: estimate the share of attention that was kept.
      starts_plain: see `attend_sparsely`.
      mesh: cuts the chunk, which is then the whole prompt; None for one device.
    """

    graphdef: Any
    layers: tuple[tuple[Pattern, ...], ...]
    blocks: Blocks
    implementation: Backend | None = None
    measures_recall: bool = True
    starts_plain: bool = False
    mesh: Mesh | None = None

    def jitted(self, state: Any, num_kv_heads: int):
        """`run_chunk` as a function of its arrays; the carry's memory is given up to the result.

        Args:
          state: of the model, arrays or shapes; it says how the weights are cut.
        """
        from flax import nnx

        shards = shards_of(self.mesh, num_kv_heads=num_kv_heads)
        cuts = layer_cuts(nnx.split(nnx.merge(self.graphdef, state).layers)[1], shards)

        def run(*args):
            return run_chunk(self, shards, cuts, *args)

        if self.mesh is not None:
            carry_specs = (CACHE_SPEC, CACHE_SPEC, P())
            in_specs = (weight_specs(state, shards), TOKENS_SPEC, ROPE_SPEC, P(), P(), P(), carry_specs)
            run = jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=(carry_specs, P()), check_vma=False)
        return jax.jit(run, donate_argnums=6, keep_unused=True)


def run_chunk(
    program: Program, shards: Shards, cuts: tuple[int | None, ...],
    state, x, rope_pos, layout: TokenLayout, q_start, wanted, carry,
):  # fmt: skip
    """All layers over one chunk of tokens, or over this device's piece of the prompt.

    Args:
      x, rope_pos, carry: this device's embeddings, positions and caches, and hidden states `[b, n, e]` found so far.
      layout, q_start: of the whole prompt.
      wanted: tokens of each prompt whose hidden states are kept, int32 `[b, n]`.

    Returns:
      The caches, and the wanted hidden states with those that stand in this chunk; and statistics of each piece and
      layer: density and recall `[pieces, layers, b, h]`, the queries behind the recall and whether q and k were finite
      `[pieces, layers, b]`.
    """
    from flax import nnx

    k, v, hidden = carry
    model: Any = nnx.merge(program.graphdef, state)
    rotary = model.rotary(rope_pos)
    graphdef, layer_state = nnx.split(model.layers)
    statistics = []
    for first, end in _spans(program.layers):
        attend_heads = _attention(program, shards, program.layers[first], x, layout, q_start)

        def layer(carry, n, attend_heads=attend_heads):
            x, k, v = carry
            weights = shards.whole(jax.tree.map(lambda a: a[n], layer_state), cuts)
            module: Any = nnx.merge(graphdef, weights)

            def attend(q, k_new, v_new):
                q, k_new, v_new = (shards.by_heads(new) for new in (q, k_new, v_new))
                at = q_start if shards.num_devices == 1 else 0
                k_all, v_all = (
                    jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), (n, 0, at, 0, 0))
                    for cache, new in ((k, k_new), (v, v_new))
                )
                out, layer_statistics = attend_heads(q, shards.all_tokens(k_all[n]), shards.all_tokens(v_all[n]))
                return shards.by_tokens(out), (k_all, v_all, layer_statistics)

            x, (k, v, layer_statistics) = module(x, rotary, attend)
            return (x, k, v), layer_statistics

        (x, k, v), span_statistics = jax.lax.scan(layer, (x, k, v), jnp.arange(first, end))
        statistics.append(span_statistics)
    hidden = _hidden_at(shards, x, wanted, q_start, hidden)
    return (k, v, hidden), _join(shards, jax.tree.map(lambda *xs: jnp.concatenate(xs), *statistics))


def _attention(program: Program, shards: Shards, patterns: tuple[Pattern, ...], x, layout: TokenLayout, q_start):
    """`(q, k, v) -> (out, statistics)` for the queries and heads of this device; the geometry is made here, once."""
    num_queries = x.shape[1] * shards.heads
    first_query = shards.first_query(q_start, num_queries)

    def of_group(patterns):
        geometry = batch_geometry(
            layout, patterns, batch=x.shape[0], num_queries=num_queries, q_start=first_query, blocks=program.blocks
        )

        def attend(q, k, v):
            result = attend_sparsely(
                q, k, v, patterns, layout=layout, geometry=geometry, q_start=first_query,
                blocks=program.blocks, implementation=program.implementation, starts_plain=program.starts_plain,
            )  # fmt: skip
            return result.out, _statistics(program, result, q, k, layout, first_query)

        return attend

    branches = [of_group(group) for group in shards.per_group(patterns)]
    return lambda q, k, v: shards.in_group(branches, q, k, v)


def _hidden_at(shards: Shards, x, wanted, q_start, hidden):
    """The hidden states of the wanted tokens: those that stand in this chunk, and the others as they were."""
    place = wanted - shards.first_token(q_start, x.shape[1])
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


def _statistics(program: Program, result: SparseAttention, q, k, layout: TokenLayout, q_start):
    """Density and recall of each head, `[b, h]`, the queries behind the recall `[b]`, and whether q, k are finite."""
    queries = layout.window(q_start, q.shape[1])
    is_finite = jnp.array(
        [
            jnp.all(jnp.where(layout_part.is_real[..., None, None], jnp.isfinite(x), True), axis=(1, 2, 3))
            for x, layout_part in ((q, queries), (k, layout))
        ]
    ).all(axis=0)
    density = result.density()
    num_real = queries.is_real.sum(axis=1)
    if not program.measures_recall:
        recall = jnp.full(density.shape, jnp.nan)
    elif result.plan is None:  # nothing was left out, and its log-sum-exp is rounded
        recall = jnp.ones_like(density)
    else:
        recall = jax.vmap(_recall)(q, k, result.lse, queries, layout)
    return {"density": density, "recall": recall, "num_queries": num_real, "is_finite": is_finite}


def _recall(q, k, lse, queries: TokenLayout, keys: TokenLayout):
    """Mean over evenly spaced queries of the share of attention that was kept, per head; one example."""
    num_real = queries.is_real.sum()
    rows = ((jnp.arange(NUM_RECALL_QUERIES) + 0.5) * num_real / NUM_RECALL_QUERIES).astype(jnp.int32)
    q_pos = jnp.where(queries.is_real, queries.pos, PADDING)[rows]
    kv_pos = jnp.where(keys.is_real, keys.pos, jnp.iinfo(jnp.int32).max)
    ratio, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5

    def head(h):
        dense = estimate.dense_lse(q[rows, h], k[:, h // ratio], q_pos, kv_pos, scale)
        kept = jnp.exp(lse[h, rows] - jnp.where(jnp.isfinite(dense), dense, 0.0))
        return jnp.mean(kept, where=q_pos >= 0)

    return jax.lax.map(head, jnp.arange(q.shape[1]))


def _spans(layers: tuple[tuple[Pattern, ...], ...]) -> list[tuple[int, int]]:
    """Runs of consecutive layers with the same patterns: each is one scan."""
    cuts = [n for n in range(1, len(layers)) if layers[n] != layers[n - 1]]
    return list(zip([0, *cuts], [*cuts, len(layers)], strict=True))
