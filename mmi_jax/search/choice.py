"""The choice of a pattern for all heads and layers together, within one budget that holds on every prompt."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmi_jax.method.patterns import Dense, Pattern
from mmi_jax.method.tables.cost_model import CostModel
from mmi_jax.method.tables.pattern_table import HeadScores, PerHead
from mmi_jax.search.costs import DENSITY, layer_cost
from mmi_jax.search.knapsack import choose_within_budget
from mmi_jax.search.scores import Choice, Scores
from mmi_jax.search.trials.trial import DENSE, Trial
from pallas_kernels.notation import Float

ROUNDING = 1e-9
"""By which a sum of floats may exceed a budget that it meets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSpeedup:
    """Attention `times` as fast as dense on every prompt, by the device's cost model, launches included."""

    times: float

    def __post_init__(self):
        """Raises ValueError for a factor below 1."""
        if not self.times >= 1:
            raise ValueError(f"a target speed-up must be at least 1, got {self.times}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetDensity:
    """Visited tiles at most this fraction of those of dense attention on every prompt; no other cost counts."""

    fraction: float

    def __post_init__(self):
        """Raises ValueError for a fraction outside 0 to 1."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"a target density must be above 0 and at most 1, got {self.fraction}")


type Target = TargetSpeedup | TargetDensity
type Choices = tuple[tuple[Choice, ...], ...]
"""By layer and head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The choice for every head.

    Args:
      choices: by layer and head.
      relative_costs: by prompt, cost of the attention of all layers over that of dense attention, launches included:
        1 over the speed-up.
      scores: error of the choices over all prompts; density and cost on the most expensive one.
    """

    choices: Choices
    relative_costs: Mapping[str, float]
    scores: HeadScores

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials that say what the choices do, for measuring them on other prompts."""
        chosen = (trial for layer in self.choices for choice in layer for trial in choice.trials)
        return tuple(dict.fromkeys((DENSE, *chosen)))

    def error_on(self, scores: Scores) -> float:
        """Mean weighted error over heads of the same choices by other scores."""
        return float(np.mean(_per_head(self.choices, scores.weighted_error)))


def choose_patterns(
    scores: Scores, target: Target, costs: CostModel, *, excluded: frozenset[str] = frozenset()
) -> SearchResult:
    """The choice with the least sum of weighted errors over all heads whose cost meets the target on EVERY prompt.

    Dense is an option of every head, so that it stays where nothing cheap is good and the budget allows it. A head
    counts with its cost on its most expensive prompt (`Scores.option`): sums of these are at least the sum on any
    prompt.

    Raises:
      ValueError: the target cannot be met; the message says what can.
    """
    num_layers, num_heads = scores.num_layers, scores.num_heads
    is_speedup = isinstance(target, TargetSpeedup)
    prices = costs if is_speedup else DENSITY
    options = [scores.options(n, h, prices, excluded=excluded) for n in range(num_layers) for h in range(num_heads)]
    assert all(of_head[0].item == scores.dense for of_head in options)
    cheapest = sum(min(option.cost for option in of_head) for of_head in options)
    dense_head = scores.dense_cost(prices)
    whole = dense_attention_cost(scores, costs) if is_speedup else num_layers * num_heads * dense_head
    allowed = whole / target.times if is_speedup else whole * target.fraction
    launches = num_layers * costs.launches(()) if is_speedup else 0.0
    while True:  # patterns cost launches as well, how many is known once they are chosen; what is kept for them grows
        affordable = (allowed - launches) / dense_head  # dense heads, on each prompt
        budget = float(affordable.min()) * (1 + ROUNDING)
        if budget < cheapest:
            raise ValueError(_out_of_reach(target, scores, ((cheapest * dense_head + launches) / whole).max()))
        picked = [option.item for option in choose_within_budget(options, budget)]
        choices = tuple(tuple(picked[n * num_heads : (n + 1) * num_heads]) for n in range(num_layers))
        needed = sum(costs.launches([choice.pattern for choice in layer]) for layer in choices) if is_speedup else 0.0
        if needed <= launches:
            relative = relative_costs(choices, scores, costs)
            return SearchResult(
                choices=choices, relative_costs=relative, scores=_head_scores(scores, choices, relative, costs)
            )
        launches = needed


def _out_of_reach(target: Target, scores: Scores, reachable: float) -> str:
    lengths = sorted(scores.lengths.values())
    return (
        f"{target} is out of reach on all of {len(lengths)} prompts of {lengths[0]} to {lengths[-1]} tokens: the "
        f"cheapest table costs {reachable:.1%} of dense attention (a speed-up of {1 / reachable:.2f}, or that density)"
    )


def dense_attention_cost(scores: Scores, costs: CostModel) -> Float[np.ndarray, " b"]:
    """Milliseconds of dense attention in all layers on each prompt, launches included."""
    dense = (Dense(),) * scores.num_heads
    heads = np.tile(scores.dense_cost(costs), (scores.num_heads, 1))
    return scores.num_layers * _layer_costs(dense, heads, scores, costs)


def relative_costs(choices: Sequence[Sequence[Choice]], scores: Scores, costs: CostModel) -> dict[str, float]:
    """By prompt: cost of the choices in all layers, launches included, over that of dense attention."""
    total = np.zeros(len(scores.lengths))
    for n, layer in enumerate(choices):
        heads = np.array([scores.cost(costs, choice, n, h) for h, choice in enumerate(layer)])
        total += _layer_costs([choice.pattern for choice in layer], heads, scores, costs)
    return dict(zip(scores.lengths, map(float, total / dense_attention_cost(scores, costs)), strict=True))


def _layer_costs(
    patterns: Sequence[Pattern], heads: Float[np.ndarray, "h b"], scores: Scores, costs: CostModel
) -> Float[np.ndarray, " b"]:
    """Milliseconds of a layer on each prompt, whose heads add so much."""
    lengths = scores.lengths.values()
    return np.array([layer_cost(costs, patterns, row, tokens) for row, tokens in zip(heads.T, lengths, strict=True)])


def _head_scores(scores: Scores, choices: Choices, relative_costs: Mapping[str, float], costs: CostModel) -> HeadScores:
    """Error of every head over all prompts; its density and cost, and that of a dense one, on the most expensive."""
    worst = int(np.argmax(list(relative_costs.values())))

    def density(choice: Choice, layer: int, head: int) -> float:
        return float((scores.tiles(choice, layer, head) / scores.dense_tiles[:, layer, head])[worst])

    return HeadScores(
        error=_per_head(choices, scores.error),
        density=_per_head(choices, density),
        cost=_per_head(choices, lambda choice, n, h: scores.cost(costs, choice, n, h)[worst]),
        dense_cost=float(scores.dense_cost(costs)[worst]),
        weight=None if scores.weights is None else _per_head(choices, lambda _, n, h: scores.weight(n, h)),
    )


def _per_head(choices: Choices, value: Callable[[Choice, int, int], float]) -> PerHead:
    """A number of each choice, by its layer and head."""
    return tuple(tuple(float(value(choice, n, h)) for h, choice in enumerate(layer)) for n, layer in enumerate(choices))
