"""Plans of chosen heads of one layer, as a prefill makes them, for pictures and study."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmi_jax.engine.programs.single_layer import run_layer, split_layers
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.method.dispatch import attend_sparsely
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.plan import Plan, plan_heads, prompt_geometry
from mmi_jax.method.tables.pattern_table import PatternTable
from pallas_kernels.block_lists.block_sizes import Blocks


def plan_of_heads(
    model: VisionLanguageModel,
    prompt: Any,
    table: PatternTable,
    *,
    layer: int,
    heads: Sequence[int],
    blocks: Blocks | None = None,
) -> Plan:
    """The plan of some heads of one layer for a prompt that goes through the layers in one piece.

    The layers before run as in `prefill`, so the cost grows with `layer`.

    Args:
      model, prompt, table, blocks: as for `prefill`; a batch of one prompt.
      heads: query heads; the plan's heads in this order.

    Raises:
      ValueError: the layer or a head is not in the table, or the batch holds several prompts.
    """
    if not 0 <= layer < table.num_layers or not all(0 <= head < table.num_heads for head in heads):
        raise ValueError(
            f"the table has {table.num_layers} layers of {table.num_heads} heads: got {layer=}, heads={list(heads)}"
        )
    if prompt.tokens.shape[0] != 1:
        raise ValueError(f"a plan is traced for one prompt, got a batch of {prompt.tokens.shape[0]}")
    blocks = blocks or Blocks()
    pad = Buckets().length_for(prompt.tokens.shape[1]) - prompt.tokens.shape[1]
    x = jnp.pad(model.embed(prompt), ((0, 0), (0, pad), (0, 0)))
    rotary = model.rotary(jnp.pad(jnp.asarray(prompt.rope_pos), ((0, 0), (0, 0), (0, pad))))
    layout = jax.tree.map(jnp.asarray, prompt.layout.pad_to(x.shape[1]))
    graphdef, weights = split_layers(model)
    for n in range(layer):
        x = _sparse_layer(graphdef, table.layers[n], blocks, weights(n), x, rotary, layout)
    return _plan(graphdef, table.layers[layer], tuple(heads), blocks, weights(layer), x, rotary, layout)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sparse_layer(graphdef, patterns: tuple[Pattern, ...], blocks: Blocks, weights, x, rotary, layout):
    """The layer's output."""

    def attend(q, k, v):
        return attend_sparsely(q, k, v, patterns, layout=layout, blocks=blocks).out, None

    return run_layer(graphdef, weights, x, rotary, attend)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _plan(
    graphdef, patterns: tuple[Pattern, ...], heads: tuple[int, ...], blocks: Blocks, weights, x, rotary, layout
) -> Plan:
    """The plan of the layer's heads."""
    _, (q, k) = run_layer(graphdef, weights, x, rotary, lambda q, k, v: (jnp.zeros_like(q), (q, k)))
    ratio = q.shape[2] // k.shape[2]
    chosen = [patterns[head] for head in heads]
    layout = jax.tree.map(lambda a: a[0], layout)
    geometry = prompt_geometry(layout, chosen, num_queries=q.shape[1], q_start=jnp.int32(0), blocks=blocks)
    q, k = q[0][:, list(heads)], k[0][:, [head // ratio for head in heads]]
    return plan_heads(chosen, q, k, geometry, scale=q.shape[-1] ** -0.5, blocks=blocks)
