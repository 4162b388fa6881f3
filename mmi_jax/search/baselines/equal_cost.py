"""Cost of a prefill's attention, and the member of a family of patterns that costs as much as something else."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mmi_jax.engine.programs.compilation import compile_options
from mmi_jax.engine.reporting.report import PrefillReport
from mmi_jax.layout import TokenLayout
from mmi_jax.method.patterns import Dense, Pattern
from mmi_jax.method.plan import batch_geometry, plan_batch
from mmi_jax.method.tables.cost_model import CostModel
from mmi_jax.search.activations import num_tokens_of
from mmi_jax.search.costs import layer_cost
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Array, Float


def dense_tiles(num_tokens: int, blocks: Blocks) -> float:
    """Tiles that a dense plan visits: in each q block those up to its last query."""
    last = np.minimum(np.arange(1, blocks.round_q(num_tokens) // blocks.q + 1) * blocks.q, num_tokens)
    return float((-(-last // blocks.kv)).sum())


def visited_tiles(density: np.ndarray | float, num_tokens: int, blocks: Blocks) -> np.ndarray:
    """Tiles behind a density; `Plan.density` counts against the pairs of dense attention and half a block more."""
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
    sparse, dense = (sum(costs_of_layers) for costs_of_layers in zip(*layers, strict=True))
    return sparse, dense


def _layer_costs(
    patterns: Sequence[Pattern], tiles: np.ndarray, costs: CostModel, num_tokens: int, blocks: Blocks
) -> tuple[float, float]:
    """Cost of a layer whose heads visit so many tiles, and of a dense one."""
    heads = [float(costs.head_of(p, n, num_tokens, blocks)) for p, n in zip(patterns, tiles, strict=True)]
    dense = float(costs.head_of(Dense(), dense_tiles(num_tokens, blocks), num_tokens, blocks))
    all_dense = layer_cost(costs, (Dense(),) * len(heads), [dense] * len(heads), num_tokens)
    return layer_cost(costs, patterns, heads, num_tokens), all_dense


@dataclasses.dataclass(frozen=True)
class PlanInputs:
    """What plans read of one layer's activations: half of them, so that several layers can be held.

    Args:
      q, k: after rotation.
      layout: fields [1, t].
    """

    q: Float[Array, "1 t h d"]
    k: Float[Array, "1 t g d"]
    layout: TokenLayout


def relative_cost(pattern: Pattern, layers: Sequence[PlanInputs], costs: CostModel, blocks: Blocks) -> float:
    """Cost of one pattern on all heads of these layers over that of dense attention; plans are made, no more."""
    num_tokens = num_tokens_of(layers[0])
    relative = []
    for layer in layers:
        tiles = np.asarray(_plan_program()(pattern, blocks, layer.q, layer.k, layer.layout), np.float64)
        sparse, dense = _layer_costs((pattern,) * len(tiles), tiles, costs, num_tokens, blocks)
        relative.append(sparse / dense)
    return float(np.mean(relative))


def member_at_cost(
    ladder: Sequence[Pattern], target: float, layers: Sequence[PlanInputs], costs: CostModel, blocks: Blocks
) -> tuple[Pattern, float]:
    """The pattern whose relative cost is nearest to the target, and that cost; costs rise along the ladder.

    The search begins where the cost model expects it, since a program is compiled for every member that is tried.
    """
    cost = functools.cache(lambda n: relative_cost(ladder[n], layers, costs, blocks))
    start = _expected_member(ladder, target, num_tokens_of(layers[0]), layers[0].q.shape[2], costs, blocks)
    low, high = _bracket(cost, target, start, len(ladder))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) >= target else (middle, high)
    nearest = min({max(low, 0), min(high, len(ladder) - 1)}, key=lambda n: abs(cost(n) - target))
    return ladder[nearest], cost(nearest)


def _bracket(cost: Callable[[int], float], target: float, start: int, length: int) -> tuple[int, int]:
    """Two members, the first of which costs less than the target and the second not, looked for in doubling steps.

    -1 and `length` where no member is so cheap, or so expensive.
    """
    low, high, step = start, start, 1
    if cost(start) >= target:
        while low >= 0 and cost(low) >= target:
            low, high, step = low - step, low, 2 * step
        return max(low, -1), high
    while high < length and cost(high) < target:
        low, high, step = high, high + step, 2 * step
    return low, min(high, length)


def _expected_member(
    ladder: Sequence[Pattern], target: float, num_tokens: int, num_heads: int, costs: CostModel, blocks: Blocks
) -> int:
    """The first member that reaches the target if it visits what is typical of it; the last if none does."""
    num_q_blocks, num_kv_blocks = (-(-num_tokens // size) for size in (blocks.q, blocks.kv))
    for n, pattern in enumerate(ladder):
        tiles = np.full(num_heads, num_q_blocks * (pattern.typical_blocks(num_kv_blocks, blocks) or 0.0))
        sparse, dense = _layer_costs((pattern,) * num_heads, tiles, costs, num_tokens, blocks)
        if sparse >= target * dense:
            return n
    return len(ladder) - 1


@functools.cache
def _plan_program() -> Callable[..., Array]:
    """`_plan_tiles`, compiled with the options of the default device, which is looked up when called."""
    return jax.jit(_plan_tiles, static_argnums=(0, 1), compiler_options=compile_options())


def _plan_tiles(pattern: Pattern, blocks: Blocks, q, k, layout):
    """Tiles that each head visits."""
    patterns = (pattern,) * q.shape[2]
    geometry = batch_geometry(layout, patterns, batch=1, num_queries=q.shape[1], q_start=None, blocks=blocks)
    plan = plan_batch(patterns, q, k, geometry, scale=q.shape[-1] ** -0.5, blocks=blocks)
    return plan.index.count.astype("float32").sum(axis=2)[0]
