"""From scores to a table: the budget as one dial, the best choice for all heads and layers together."""

import dataclasses

import numpy as np

from mmi_jax.cost import CostModel
from mmi_jax.patterns import Dense
from mmi_jax.search.budget import Option, choose
from mmi_jax.search.costs import DENSITY, layer_cost
from mmi_jax.search.scores import Choice, Scores
from mmi_jax.search.trials import DENSE, Trial
from mmi_jax.table import HeadScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSpeedup:
    """Attention `times` as fast as dense, by the device's cost model, launches included."""

    times: float

    def __post_init__(self):
        """Raises ValueError for a factor below 1."""
        if not self.times >= 1:
            raise ValueError(f"a target speed-up must be at least 1, got {self.times}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetDensity:
    """Visited tiles at most this share of those of dense attention; what a plan costs besides does not count."""

    share: float

    def __post_init__(self):
        """Raises ValueError for a share outside 0 to 1."""
        if not 0 < self.share <= 1:
            raise ValueError(f"a target density must be above 0 and at most 1, got {self.share}")


type Target = TargetSpeedup | TargetDensity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """The choice for every head.

    Args:
      choices: by layer and head.
      scores: error and cost of the choices.
    """

    choices: tuple[tuple[Choice, ...], ...]
    scores: HeadScores

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials that say what the choices do, for measuring them on other prompts."""
        return tuple(dict.fromkeys((DENSE, *(t for row in self.choices for choice in row for t in choice.trials))))

    def error_on(self, scores: Scores) -> float:
        """Mean error over heads of the same choices by other scores."""
        return float(np.mean([[scores.error(choice, n, h) for h, choice in enumerate(row)]
                              for n, row in enumerate(self.choices)]))  # fmt: skip


def best_choice(scores: Scores, target: Target, costs: CostModel, *, excluded: frozenset[str] = frozenset()) -> Best:
    """The choice with the least sum of errors over all heads and layers whose cost keeps to the target.

    Dense is an option of every head, so that it stays where nothing cheap is good and the budget allows it.

    Raises:
      ValueError: the target cannot be met; the message says what can.
    """
    shape = scores.num_layers, scores.num_heads
    is_speedup = isinstance(target, TargetSpeedup)
    prices = costs if is_speedup else DENSITY
    options = [scores.options(n, h, prices, excluded=excluded) for n in range(shape[0]) for h in range(shape[1])]
    dense = [row[0].cost for row in options]
    assert all(row[0].what.pattern == Dense() for row in options)
    cheapest = sum(min(option.cost for option in row) for row in options)
    if is_speedup:
        per_layer = (dense[n * shape[1] : (n + 1) * shape[1]] for n in range(shape[0]))
        whole = sum(layer_cost(costs, (Dense(),) * shape[1], heads, scores.num_tokens) for heads in per_layer)
        budget, launches = whole / target.times, shape[0] * costs.launches(())
    else:
        whole, launches = sum(dense), 0.0
        budget = target.share * whole
    while True:  # patterns cost launches as well, how many is known once they are chosen; what is kept for them grows
        if budget - launches < cheapest:
            least = (cheapest + launches) / whole
            raise ValueError(
                f"{target} is out of reach on prompts of {scores.num_tokens} tokens: the cheapest table costs "
                f"{least:.1%} of dense attention (a speed-up of {1 / least:.2f}, or that density)"
            )
        picked = choose(options, budget - launches)
        rows = tuple(tuple(picked[n * shape[1] : (n + 1) * shape[1]]) for n in range(shape[0]))
        choices = tuple(tuple(option.what for option in row) for row in rows)
        needed = sum(costs.launches([choice.pattern for choice in row]) for row in choices) if is_speedup else 0.0
        if needed <= launches:
            return Best(choices=choices, scores=_head_scores(scores, rows, costs))
        launches = needed


def _head_scores(scores: Scores, rows: tuple[tuple[Option, ...], ...], costs: CostModel) -> HeadScores:
    """Error, density and cost of every head, and of a dense one, whose cost differs between heads only in rounding."""
    dense = Choice(pattern=DENSE.candidate, trials=(DENSE,) * len(scores.modalities))
    heads = [[(option, n, h) for h, option in enumerate(row)] for n, row in enumerate(rows)]

    def grid(value) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(value(option, n, h) for option, n, h in row) for row in heads)

    return HeadScores(
        error=grid(lambda option, n, h: option.error),
        density=grid(lambda o, n, h: scores.tiles(o.what, n, h) / scores.tiles(dense, n, h)),
        cost=grid(lambda o, n, h: scores.cost(costs, o.what, n, h)),
        dense_cost=float(np.mean(grid(lambda o, n, h: scores.cost(costs, dense, n, h)))),
    )


def total_share(best: Best, scores: Scores, costs: CostModel) -> float:
    """Cost of all layers over that of dense ones, launches included: 1 over the speed-up of attention."""
    found, dense = 0.0, 0.0
    for row, heads in zip(best.choices, best.scores.cost, strict=True):
        found += layer_cost(costs, [choice.pattern for choice in row], heads, scores.num_tokens)
        all_dense = (best.scores.dense_cost,) * len(row)
        dense += layer_cost(costs, (Dense(),) * len(row), all_dense, scores.num_tokens)
    return found / dense
