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
from mmi_jax.search.costs import head_cost, layer_cost


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
    tiles = dense_tiles(num_tokens, blocks)
    found, dense = 0.0, 0.0
    for patterns, visited in zip(report.table.layers, visited_tiles(report.density, num_tokens, blocks), strict=True):
        heads = [
            float(head_cost(costs, pattern, tile_count, num_tokens=num_tokens, blocks=blocks))
            for pattern, tile_count in zip(patterns, visited, strict=True)
        ]
        all_dense = [float(head_cost(costs, Dense(), tiles, num_tokens=num_tokens, blocks=blocks))] * len(heads)
        found += layer_cost(costs, patterns, heads, num_tokens)
        dense += layer_cost(costs, (Dense(),) * len(heads), all_dense, num_tokens)
    return found, dense


def cost_share(pattern: Pattern, layers: Sequence[Captured], costs: CostModel, blocks: Blocks) -> float:
    """Cost of one pattern on all heads of these layers over that of dense attention; plans are made, no more."""
    num_tokens = int(np.asarray(layers[0].layout.is_real).sum())
    shares = []
    for layer in layers:
        tiles = np.asarray(_plan_tiles(pattern, blocks, layer.q, layer.k, layer.layout), np.float64)
        heads = np.asarray(head_cost(costs, pattern, tiles, num_tokens=num_tokens, blocks=blocks))
        dense = float(head_cost(costs, Dense(), dense_tiles(num_tokens, blocks), num_tokens=num_tokens, blocks=blocks))
        patterns, all_dense = (pattern,) * len(heads), (Dense(),) * len(heads)
        found = layer_cost(costs, patterns, heads.tolist(), num_tokens)
        shares.append(found / layer_cost(costs, all_dense, [dense] * len(heads), num_tokens))
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
