"""One option for each head, least error within a budget: the multiple-choice knapsack, solved exactly on a grid."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

GRID = 2**16
"""Steps of the budget. Costs are rounded up to whole steps, so a choice never exceeds the budget; with 784 heads (a 7B)
at most 784 steps, 1.2 % of the budget, are lost by it."""

MOST_OPTIONS = 2**16
"""Options of one head that a choice can number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """Something that a head may do.

    Args:
      what: whatever the caller chooses among.
      error, cost: not negative; in any unit, the same for all heads.
    """

    what: Any
    error: float
    cost: float


def undominated(options: Sequence[Option]) -> list[Option]:
    """The options for which no other is at most as dear and better, cheapest first, errors falling."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def choose(heads: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """One option for each head: the least sum of errors among all choices whose costs sum to at most the budget.

    A threshold on error saved per cost (a Lagrange multiplier) finds only choices on the lower convex hull and misses
    the budget by up to one option of one head, which is much in a model of 64 heads; the dynamic programme over heads
    is exact for costs in whole steps of `budget / GRID`, in a second for 784 heads.

    Raises:
      ValueError: even the cheapest options exceed the budget.
    """
    heads = [undominated(options) for options in heads]
    if not heads or not all(heads):
        raise ValueError("every head needs at least one option to choose from")
    cheapest = sum(options[0].cost for options in heads)
    steps = [[_steps(option.cost, budget) for option in options] for options in heads]
    if cheapest > budget:
        raise ValueError(f"no choice is within budget: the cheapest costs {cheapest:.6g}, the budget is {budget:.6g}")
    if sum(options[-1].cost for options in heads) <= budget:
        return [options[-1] for options in heads]
    if sum(row[0] for row in steps) > GRID:  # within the budget, but not once rounded up: nothing dearer is either
        return [options[0] for options in heads]
    best = np.zeros(GRID + 1)  # least error of the heads so far within so many steps
    chosen = np.zeros((len(heads), GRID + 1), np.uint16)
    for n, options in enumerate(heads):
        assert len(options) < MOST_OPTIONS
        total = np.full(GRID + 1, np.inf)
        for number, (option, step) in enumerate(zip(options, steps[n], strict=True)):
            if step > GRID:
                continue
            error = best[: GRID + 1 - step] + option.error
            is_better = error < total[step:]
            total[step:][is_better] = error[is_better]
            chosen[n, step:][is_better] = number
        best = total
    left, picked = GRID, []
    for n in reversed(range(len(heads))):
        number = int(chosen[n, left])
        picked.append(heads[n][number])
        left -= steps[n][number]
    return picked[::-1]


def _steps(cost: float, budget: float) -> int:
    """The cost in whole steps, rounded up; a rounding error of a float is no step."""
    return int(np.ceil(np.float64(cost) / budget * GRID - 1e-6)) if budget > 0 else GRID + 1
