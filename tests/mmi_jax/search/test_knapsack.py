"""The budgeted choice against brute force, and its refusals."""

import itertools

import numpy as np
import pytest

from mmi_jax.search.knapsack import GRID, Option, choose_within_budget, pareto_optimal


def brute_force(heads, budget):
    """The least error of every affordable choice."""
    affordable = [
        (sum(option.error for option in choice), sum(option.cost for option in choice))
        for choice in itertools.product(*heads)
        if sum(option.cost for option in choice) <= budget
    ]
    return min(affordable)[0]


def random_heads(rng, num_heads, num_options):
    return [
        [Option(item=n, error=float(e), cost=float(c)) for n, (e, c) in enumerate(zip(errors, costs, strict=True))]
        for errors, costs in zip(
            rng.random((num_heads, num_options)), rng.integers(1, 60, (num_heads, num_options)), strict=True
        )
    ]


@pytest.mark.parametrize("budget", [90, 140, 200, 250])
def test_the_choice_is_the_best_of_all(rng, budget):
    """Costs in whole numbers and budgets that divide the grid's steps leave nothing to rounding."""
    for _ in range(5):
        heads = random_heads(rng, 5, 4)
        if sum(min(o.cost for o in row) for row in heads) > budget:
            continue
        scale = GRID / budget
        exact = [
            [Option(item=o.item, error=o.error, cost=float(np.floor(o.cost * scale))) for o in row] for row in heads
        ]
        picked = choose_within_budget(exact, float(GRID))
        assert sum(o.cost for o in picked) <= GRID
        assert sum(o.error for o in picked) == pytest.approx(brute_force(exact, float(GRID)), abs=1e-12)


def test_a_threshold_on_the_hull_would_miss_this_choice():
    """Middle options off the lower convex hull: the best choice within 10 takes both."""
    off_hull = [
        Option(item="cheap", error=10.0, cost=0.0),
        Option(item="middle", error=6.0, cost=5.0),
        Option(item="dense", error=0.0, cost=11.0),
    ]
    assert [option.item for option in choose_within_budget([off_hull] * 2, 10.0)] == ["middle", "middle"]


def test_dense_everywhere_when_the_budget_allows_it(rng):
    heads = [[*row, Option(item="dense", error=0.0, cost=60.0)] for row in random_heads(rng, 8, 5)]
    assert {option.item for option in choose_within_budget(heads, 8 * 60.0)} == {"dense"}


def test_a_budget_below_the_cheapest_is_refused(rng):
    heads = [[Option(item="a", error=0.0, cost=3.0), Option(item="b", error=1.0, cost=2.0)]] * 3
    with pytest.raises(ValueError, match="the cheapest costs 6, the budget is 5.5"):
        choose_within_budget(heads, 5.5)
    assert sum(o.cost for o in choose_within_budget(heads, 6.0)) == 6.0


POINTS = [(3.0, 1.0), (2.0, 2.0), (2.0, 3.0), (4.0, 1.0), (0.0, 9.0)]


def test_pareto_optimal_options_are_cheapest_first_and_errors_fall():
    options = [Option(item=n, error=e, cost=c) for n, (e, c) in enumerate(POINTS)]
    assert [option.item for option in pareto_optimal(options)] == [0, 1, 4]


def test_784_heads_take_little_time_and_stay_within_rounding_of_the_relaxed_optimum(rng):
    """The relaxed optimum (fractions of two neighbours on the hull) bounds every choice from below."""
    heads = []
    for _ in range(784):
        cost = np.sort(rng.random(8))
        error = np.sort(rng.random(8))[::-1] * rng.random()
        heads.append(
            [Option(item=n, error=float(e), cost=float(c)) for n, (e, c) in enumerate(zip(error, cost, strict=True))]
        )
    budget = 0.4 * 784
    picked = choose_within_budget(heads, budget)
    error, cost = (sum(getattr(o, field) for o in picked) for field in ("error", "cost"))
    assert cost <= budget
    max_of_a_head = 1.0  # a mixture of two options in one head is all that divides the relaxed optimum from a choice
    assert error <= relaxed(heads, budget * (1 - 784 / GRID)) + max_of_a_head


def relaxed(heads, budget):
    """The least error of a mixture of options, by a price on cost: the greatest lower bound over prices."""
    prices = np.geomspace(1e-3, 1e3, 400)
    costs, errors = (np.array([[getattr(o, f) for o in row] for row in heads]) for f in ("cost", "error"))
    return max(float((errors + p * costs).min(axis=1).sum() - p * budget) for p in prices)
