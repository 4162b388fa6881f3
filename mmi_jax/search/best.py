"""From scores to a table: the budget as one dial, the best choice for all heads and layers together."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mmi_jax.method.patterns import Dense, Pattern
from mmi_jax.method.tables.cost_model import CostModel
from mmi_jax.method.tables.pattern_table import HeadScores
from mmi_jax.search.budget import choose
from mmi_jax.search.costs import DENSITY, layer_cost
from mmi_jax.search.scores import Choice, Scores
from mmi_jax.search.trials import DENSE, Trial
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
    """Visited tiles at most this share of those of dense attention on every prompt; no other cost of a plan counts."""

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
      shares: by prompt, cost of the attention of all layers over that of dense attention, launches included: 1 over
        the speed-up.
      scores: error of the choices over all prompts; density and cost on the dearest one.
    """

    choices: tuple[tuple[Choice, ...], ...]
    shares: Mapping[str, float]
    scores: HeadScores

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials that say what the choices do, for measuring them on other prompts."""
        return tuple(dict.fromkeys((DENSE, *(t for row in self.choices for choice in row for t in choice.trials))))

    def error_on(self, scores: Scores) -> float:
        """Mean weighted error over heads of the same choices by other scores."""
        return float(np.mean([[scores.weighted_error(choice, n, h) for h, choice in enumerate(row)]
                              for n, row in enumerate(self.choices)]))  # fmt: skip


def best_choice(scores: Scores, target: Target, costs: CostModel, *, excluded: frozenset[str] = frozenset()) -> Best:
    """The choice with the least sum of weighted errors over all heads whose cost keeps to the target on EVERY prompt.

    Dense is an option of every head, so that it stays where nothing cheap is good and the budget allows it. A head
    counts with its cost on the prompt where it is dearest (`Scores.option`): sums of these are at least the sum on any
    prompt.

    Raises:
      ValueError: the target cannot be met; the message says what can.
    """
    num_layers, num_heads = scores.num_layers, scores.num_heads
    is_speedup = isinstance(target, TargetSpeedup)
    prices = costs if is_speedup else DENSITY
    options = [scores.options(n, h, prices, excluded=excluded) for n in range(num_layers) for h in range(num_heads)]
    assert all(row[0].what == scores.dense for row in options)
    cheapest = sum(min(option.cost for option in row) for row in options)
    dense_head = scores.dense_cost(prices)
    whole = dense_attention(scores, costs) if is_speedup else num_layers * num_heads * dense_head
    allowed = whole / target.times if is_speedup else whole * target.share
    launches = num_layers * costs.launches(()) if is_speedup else 0.0
    while True:  # patterns cost launches as well, how many is known once they are chosen; what is kept for them grows
        affordable = (allowed - launches) / dense_head  # dense heads, on each prompt
        budget = float(affordable.min()) * (1 + ROUNDING)
        if budget < cheapest:
            least = ((cheapest * dense_head + launches) / whole).max()
            lengths = sorted(scores.lengths.values())
            raise ValueError(
                f"{target} is out of reach on all of {len(lengths)} prompts of {lengths[0]} to {lengths[-1]} tokens: "
                f"the cheapest table costs {least:.1%} of dense attention (a speed-up of {1 / least:.2f}, or that "
                "density)"
            )
        picked = [option.what for option in choose(options, budget)]
        choices = tuple(tuple(picked[n * num_heads : (n + 1) * num_heads]) for n in range(num_layers))
        needed = sum(costs.launches([choice.pattern for choice in row]) for row in choices) if is_speedup else 0.0
        if needed <= launches:
            shares = shares_of_dense(choices, scores, costs)
            return Best(choices=choices, shares=shares, scores=_head_scores(scores, choices, shares, costs))
        launches = needed


def dense_attention(scores: Scores, costs: CostModel) -> Float[np.ndarray, " b"]:
    """Milliseconds of dense attention in all layers on each prompt, launches included."""
    dense = (Dense(),) * scores.num_heads
    heads = np.tile(scores.dense_cost(costs), (scores.num_heads, 1))
    return scores.num_layers * _layer_costs(dense, heads, scores, costs)


def shares_of_dense(choices: Sequence[Sequence[Choice]], scores: Scores, costs: CostModel) -> dict[str, float]:
    """By prompt: cost of the choices in all layers, launches included, over that of dense attention."""
    found = np.zeros(len(scores.lengths))
    for n, row in enumerate(choices):
        heads = np.array([scores.cost(costs, choice, n, h) for h, choice in enumerate(row)])
        found += _layer_costs([choice.pattern for choice in row], heads, scores, costs)
    return dict(zip(scores.lengths, map(float, found / dense_attention(scores, costs)), strict=True))


def _layer_costs(
    patterns: Sequence[Pattern], heads: Float[np.ndarray, "h b"], scores: Scores, costs: CostModel
) -> Float[np.ndarray, " b"]:
    """Milliseconds of a layer on each prompt, whose heads add so much."""
    lengths = scores.lengths.values()
    return np.array([layer_cost(costs, patterns, own, tokens) for own, tokens in zip(heads.T, lengths, strict=True)])


def _head_scores(
    scores: Scores, choices: tuple[tuple[Choice, ...], ...], shares: Mapping[str, float], costs: CostModel
) -> HeadScores:
    """Error of every head over all prompts; its density and cost, and that of a dense one, on the dearest prompt."""
    dearest = int(np.argmax(list(shares.values())))

    def grid(value) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(float(value(choice, n, h)) for h, choice in enumerate(row)) for n, row in enumerate(choices))

    return HeadScores(
        error=grid(scores.error),
        density=grid(lambda choice, n, h: (scores.tiles(choice, n, h) / scores.dense_tiles[:, n, h])[dearest]),
        cost=grid(lambda choice, n, h: scores.cost(costs, choice, n, h)[dearest]),
        dense_cost=float(scores.dense_cost(costs)[dearest]),
        weight=None if scores.weights is None else grid(lambda _, n, h: scores.weight(n, h)),
    )
