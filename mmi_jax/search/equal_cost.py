"""What a prefill's attention cost, and which member of a family costs as much as something else."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from mmi_jax.attention import batch_geometry, plan_batch
from mmi_jax.blocks import Blocks
from mmi_jax.cost import CostModel
from mmi_jax.patterns import Dense, Pattern
from mmi_jax.report import PrefillReport
from mmi_jax.search.capture import Captured
from mmi_jax.search.costs import layer_cost


def dense_tiles(num_tokens: int, blocks: Blocks) -> float:
    """Tiles that a dense plan visits: in each q block those up to its last query."""
    last = np.minimum(np.arange(1, blocks.round_q(num_tokens) // blocks.q + 1) * blocks.q, num_tokens)
    return float((-(-last // blocks.kv)).sum())


def visited_tiles(density: np.ndarray | float, num_tokens: int, blocks: Blocks) -> np.ndarray:
    """Tiles behind a density, which `Plan.density` holds against the pairs of dense attention and half a block more."""
    pairs = num_tokens * (num_tokens + 1) / 2 + num_tokens * (max(blocks.q, blocks.kv) - 1) / 2
    return np.asarray(density * (pairs / (blocks.q * blocks.kv)))


def report_cost(report: PrefillReport, costs: CostModel, blocks: Blocks) -> tuple[float, float]:
    """Cost of the attention of one prompt of the batch, estimates and launches included, and that of dense attention.

    From the tiles that were visited, by the cost model: counted on these prompts, not timed on them.
    """
    num_tokens = round(float(np.mean(report.lengths)))
    visited = visited_tiles(report.density, num_tokens, blocks)
    layers = [
        _layer_costs(patterns, tiles, costs, num_tokens, blocks)
        for patterns, tiles in zip(report.table.layers, visited, strict=True)
    ]
    found, dense = (sum(costs_of_layers) for costs_of_layers in zip(*layers, strict=True))
    return found, dense


def _layer_costs(
    patterns: Sequence[Pattern], tiles: np.ndarray, costs: CostModel, num_tokens: int, blocks: Blocks
) -> tuple[float, float]:
    """Cost of a layer whose heads visit so many tiles, and of a dense one."""
    heads = [float(costs.head_of(p, n, num_tokens, blocks)) for p, n in zip(patterns, tiles, strict=True)]
    dense = float(costs.head_of(Dense(), dense_tiles(num_tokens, blocks), num_tokens, blocks))
    all_dense = layer_cost(costs, (Dense(),) * len(heads), [dense] * len(heads), num_tokens)
    return layer_cost(costs, patterns, heads, num_tokens), all_dense


def cost_share(pattern: Pattern, layers: Sequence[Captured], costs: CostModel, blocks: Blocks) -> float:
    """Cost of one pattern on all heads of these layers over that of dense attention; plans are made, no more."""
    num_tokens = int(np.asarray(layers[0].layout.is_real).sum())
    shares = []
    for layer in layers:
        tiles = np.asarray(_plan_tiles(pattern, blocks, layer.q, layer.k, layer.layout), np.float64)
        found, dense = _layer_costs((pattern,) * len(tiles), tiles, costs, num_tokens, blocks)
        shares.append(found / dense)
    return float(np.mean(shares))


def member_of_cost(
    ladder: Sequence[Pattern], share: float, layers: Sequence[Captured], costs: CostModel, blocks: Blocks
) -> tuple[Pattern, float]:
    """The pattern whose cost is nearest to a share of dense attention's, and its own; costs rise along the ladder."""
    cost = functools.cache(lambda n: cost_share(ladder[n], layers, costs, blocks))
    low, high = 0, len(ladder) - 1  # the first whose cost reaches the share lies between them, or is the last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) >= share else (middle + 1, high)
    nearest = min({max(low - 1, 0), low}, key=lambda n: abs(cost(n) - share))
    return ladder[nearest], cost(nearest)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _plan_tiles(pattern: Pattern, blocks: Blocks, q, k, layout):
    """Tiles that each head visits."""
    patterns = (pattern,) * q.shape[2]
    geometry = batch_geometry(layout, patterns, batch=1, num_queries=q.shape[1], q_start=None, blocks=blocks)
    plan = plan_batch(patterns, q, k, geometry, scale=q.shape[-1] ** -0.5, blocks=blocks)
    return plan.index.count.astype("float32").sum(axis=2)[0]
