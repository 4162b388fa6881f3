"""The multiple-choice knapsack, solved exactly on a grid: one option for each head, least error within a budget."""

import dataclasses
from collections.abc import Sequence

import numpy as np

GRID = 2**16
"""Steps of the budget. Costs are rounded up to whole steps, so a choice never exceeds the budget; with 784 heads (a 7B)
at most 784 steps, 1.2 % of the budget, are lost by it."""

MAX_OPTIONS = 2**16
"""Options of one head that a 16-bit number can name."""

FLOAT_SLACK = 1e-6
"""Fraction of a step that is rounding of a float and not cost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option[Item]:
    """Something that a head may do.

    Args:
      item: whatever the caller chooses among.
      error, cost: not negative; in any unit, the same for all heads.
    """

    item: Item
    error: float
    cost: float


def pareto_optimal[Item](options: Sequence[Option[Item]]) -> list[Option[Item]]:
    """The options that no other beats in error without costing more; cheapest first, errors falling."""
    front: list[Option[Item]] = []
    for option in sorted(options, key=lambda o: (o.cost, o.error)):
        if not front or option.error < front[-1].error:
            front.append(option)
    return front


def choose_within_budget[Item](heads: Sequence[Sequence[Option[Item]]], budget: float) -> list[Option[Item]]:
    """One option for each head: the least sum of errors among all choices whose costs sum to at most the budget.

    A threshold on error saved per cost (a Lagrange multiplier) finds only choices on the lower convex hull and misses
    the budget by up to one option of one head, which is much in a model of 64 heads; the dynamic programme over heads
    is exact for costs in whole steps of `budget / GRID`, in a second for 784 heads.

    Raises:
      ValueError: even the cheapest options exceed the budget.
    """
    fronts = [pareto_optimal(options) for options in heads]
    if not fronts or not all(fronts):
        raise ValueError("every head needs at least one option to choose from")
    cheapest = sum(options[0].cost for options in fronts)
    steps = [[_steps(option.cost, budget) for option in options] for options in fronts]
    if cheapest > budget:
        raise ValueError(f"no choice is within budget: the cheapest costs {cheapest:.6g}, the budget is {budget:.6g}")
    if sum(options[-1].cost for options in fronts) <= budget:
        return [options[-1] for options in fronts]
    if sum(costs[0] for costs in steps) > GRID:  # within budget until rounded up: nothing more expensive is either
        return [options[0] for options in fronts]
    chosen = _least_errors([[o.error for o in options] for options in fronts], steps)
    left, picked = GRID, []
    for n in reversed(range(len(fronts))):
        number = int(chosen[n, left])
        picked.append(fronts[n][number])
        left -= steps[n][number]
    return picked[::-1]


def _least_errors(errors: Sequence[Sequence[float]], steps: Sequence[Sequence[int]]) -> np.ndarray:
    """For each head and number of steps up to GRID, its option when it and the heads before it have the least error."""
    best = np.zeros(GRID + 1)  # least error of the heads so far within so many steps
    chosen = np.zeros((len(errors), GRID + 1), np.uint16)
    for n, of_head in enumerate(errors):
        assert len(of_head) < MAX_OPTIONS
        least = np.full(GRID + 1, np.inf)
        for number, (own_error, step) in enumerate(zip(of_head, steps[n], strict=True)):
            if step > GRID:
                continue
            error = best[: GRID + 1 - step] + own_error
            is_better = error < least[step:]
            least[step:][is_better] = error[is_better]
            chosen[n, step:][is_better] = number
        best = least
    return chosen


def _steps(cost: float, budget: float) -> int:
    """The cost in whole steps, rounded up."""
    return int(np.ceil(np.float64(cost) / budget * GRID - FLOAT_SLACK)) if budget > 0 else GRID + 1
