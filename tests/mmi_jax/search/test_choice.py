"""From scores to a table: the target holds on every prompt, answer rows count, and what is out of reach is reported."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmi_jax import AShape, Boundary2D, Dense, Grid, QBoundary, TriShape, VerticalSlash
from mmi_jax.method.tables.cost_model import HOPPER
from mmi_jax.search import TargetDensity, TargetSpeedup, choose_patterns
from mmi_jax.search.baselines.equal_cost import dense_tiles
from mmi_jax.search.choice import ROUNDING, relative_costs
from mmi_jax.search.costs import DENSITY, TILES, layer_cost
from mmi_jax.search.scores import Choice, Scores, read_scores
from mmi_jax.search.trials.measurement import TrialMetrics
from mmi_jax.search.trials.trial import DENSE, Trial, of_queries
from pallas_kernels.block_lists.block_sizes import Blocks

LENGTHS = {"video": 4096, "documents": 6000}


def random_scores(rng, num_layers, num_heads, lengths=LENGTHS) -> Scores:
    """Scores of random trials over two modalities; dense costs most and has no error, longer prompts cost more."""
    patterns = (Dense(), AShape(16, 64), TriShape(16, 64, 16), VerticalSlash(64, 64))
    trials = {t for p in patterns for t in (Trial(step="whole", candidate=p), of_queries(p))}
    joint = Trial(step="joint", candidate=Boundary2D({(1, 1): AShape(16, 32)}))
    most = np.square(np.array(list(lengths.values())) / 128)[:, None, None, None] / 4  # tiles of a modality
    by_trial = {}
    for trial in sorted({*trials, joint}, key=lambda t: t.key):
        error, answer_error, fraction = rng.random((3, len(lengths), num_layers, 2, num_heads))
        if trial == DENSE:
            error, answer_error, fraction = 0 * error, 0 * error, 1 + 0 * fraction
        by_trial[trial] = TrialMetrics(error=error, answer_error=answer_error, tiles=most * fraction)
    return Scores(modalities=(0, 1), lengths=lengths, blocks=Blocks(), by_trial=by_trial)


def hand_made(figures: dict, lengths: dict[str, int]) -> Scores:
    """One layer, one modality: by pattern, fraction of the dense tiles on each prompt, error, answer error."""
    by_trial, dense = {}, [dense_tiles(length, Blocks()) for length in lengths.values()]
    for pattern, (fractions, error, answer_error) in figures.items():
        shape = (len(lengths), 1, 1, 1)
        by_trial[Trial(step="whole", candidate=pattern)] = TrialMetrics(
            error=np.full(shape, error),
            answer_error=np.full(shape, answer_error),
            tiles=np.reshape(np.multiply(fractions, dense), shape),
        )
    return Scores(modalities=(1,), lengths=lengths, blocks=Blocks(), by_trial=by_trial)


def test_the_target_holds_on_the_most_expensive_prompt_where_the_mean_would_do():
    """20 % on the mean of two prompts, 30 % on one of them: the next cheaper pattern, although its error is larger."""
    figures = {
        Dense(): ((1, 1), 0.0, 0.0),
        Grid(): ((0.1, 0.3), 0.1, 0.1),
        AShape(): ((0.11, 0.19), 0.2, 0.2),
    }
    scores = hand_made(figures, {"video": 4096, "documents": 4096})
    grid = Choice(pattern=Grid(), trials=(Trial(step="whole", candidate=Grid()),))
    assert scores.tiles(grid, 0, 0).mean() == pytest.approx(0.2 * dense_tiles(4096, Blocks()))
    best = choose_patterns(scores, TargetDensity(fraction=0.2), DENSITY)
    assert best.choices[0][0].pattern == AShape()
    assert best.relative_costs == pytest.approx({"video": 0.11, "documents": 0.19})
    assert best.scores.density == ((pytest.approx(0.19),),)
    assert best.scores.cost[0][0] / best.scores.dense_cost == pytest.approx(0.19)
    assert choose_patterns(scores, TargetDensity(fraction=0.3), DENSITY).choices[0][0].pattern == Grid()


def test_a_relative_cost_is_of_dense_attention_over_the_same_prompt():
    """The longer prompt visits more tiles and still has the smaller relative cost."""
    figures = {Dense(): ((1, 1), 0.0, 0.0), AShape(): ((0.3, 0.2), 0.1, 0.1)}
    best = choose_patterns(hand_made(figures, {"short": 4096, "long": 8192}), TargetDensity(fraction=0.3), DENSITY)
    assert best.choices[0][0].pattern == AShape()
    assert best.relative_costs == pytest.approx({"short": 0.3, "long": 0.2})
    assert best.scores.density == ((pytest.approx(0.3),),)


def test_a_pattern_that_ruins_the_answer_rows_is_avoided():
    """It loses next to nothing of the whole, and everything of the few rows that answers are read from."""
    figures = {
        Dense(): ((1,), 0.0, 0.0),
        AShape(): ((0.1,), 0.01, 0.9),
        VerticalSlash(): ((0.1,), 0.1, 0.1),
    }
    best = choose_patterns(hand_made(figures, {"video": 4096}), TargetDensity(fraction=0.1), DENSITY)
    assert best.choices[0][0].pattern == VerticalSlash()
    assert best.scores.error == ((pytest.approx(0.1),),)


def test_the_more_important_head_gets_what_only_one_can_have(rng):
    """Two heads alike; the budget lets one be dense: the one whose error counts more."""
    dense, cheap = (np.full((1, 1, 1, 2), fraction) * dense_tiles(4096, Blocks()) for fraction in (1.0, 0.2))
    by_trial = {
        DENSE: TrialMetrics(error=0 * dense, answer_error=0 * dense, tiles=dense),
        Trial(step="whole", candidate=AShape()): TrialMetrics(
            error=0 * dense + 0.1, answer_error=0 * dense, tiles=cheap
        ),
    }
    scores = Scores(modalities=(1,), lengths={"video": 4096}, blocks=Blocks(), by_trial=by_trial)
    for weights, expected in (([[0.9, 1.1]], [AShape(), Dense()]), ([[1.1, 0.9]], [Dense(), AShape()])):
        weighted = dataclasses.replace(scores, weights=np.array(weights))
        best = choose_patterns(weighted, TargetDensity(fraction=0.65), DENSITY)
        assert [choice.pattern for choice in best.choices[0]] == expected
        assert best.error_on(weighted) == pytest.approx(0.9 * 0.05 / 2)
        assert best.scores.weight == tuple(map(tuple, weights))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(60_000, 400_000), min_size=1, max_size=4),
    target=st.one_of(
        st.builds(TargetDensity, fraction=st.floats(0.4, 1)), st.builds(TargetSpeedup, times=st.floats(1, 1.8))
    ),
)
def test_no_prompt_exceeds_the_target(seed, lengths, target):
    """Counted afresh from the tiles of the table: by density, or by milliseconds with all launches."""
    named = {f"prompt {n}": length for n, length in enumerate(lengths)}
    scores = random_scores(np.random.default_rng(seed), 2, 3, named)
    costs = HOPPER
    try:
        best = choose_patterns(scores, target, costs)
    except ValueError as error:
        assert "is out of reach on all of" in str(error)
        return
    for b, num_tokens in enumerate(lengths):
        tiles = [
            [
                sum(float(scores.by_trial[t].tiles[b, n, m, h]) for m, t in enumerate(choice.trials))
                for h, choice in enumerate(row)
            ]
            for n, row in enumerate(best.choices)
        ]
        most = float(np.square(num_tokens / 128) / 2)
        if isinstance(target, TargetDensity):
            assert np.mean(tiles) / most <= target.fraction * (1 + 2 * ROUNDING)
            continue
        cost = dense = 0.0
        for row, counts in zip(best.choices, tiles, strict=True):
            patterns = [choice.pattern for choice in row]
            heads = [float(costs.head_of(p, n, num_tokens, Blocks())) for p, n in zip(patterns, counts, strict=True)]
            cost += layer_cost(costs, patterns, heads, num_tokens)
            heads = [float(costs.head_of(Dense(), most, num_tokens, Blocks()))] * 3
            dense += layer_cost(costs, [Dense()] * 3, heads, num_tokens)
        assert cost <= dense / target.times * (1 + 2 * ROUNDING)
        assert best.relative_costs[f"prompt {b}"] == pytest.approx(cost / dense)


def test_scores_of_the_table_are_those_of_the_most_expensive_prompt(rng):
    """Heads' costs add up to what the whole costs there; errors are means over all prompts."""
    scores = random_scores(rng, 2, 3)
    best = choose_patterns(scores, TargetDensity(fraction=0.6), DENSITY)
    worst = max(best.relative_costs, key=lambda name: best.relative_costs[name])
    assert (
        np.mean(best.scores.density) == pytest.approx(best.relative_costs[worst]) and best.relative_costs[worst] <= 0.6
    )
    assert np.mean(best.scores.cost) / best.scores.dense_cost == pytest.approx(best.relative_costs[worst])
    assert np.mean(best.scores.error) == pytest.approx(best.error_on(scores))
    assert relative_costs(best.choices, scores, DENSITY) == best.relative_costs


def test_options_hold_every_kind_and_q_boundaries_of_different_patterns(rng):
    scores = random_scores(rng, 1, 1)
    options = scores.options(0, 0, DENSITY)
    assert options[0].item == Choice(pattern=Dense(), trials=(DENSE, DENSE)) and options[0].error == 0
    assert options[0].cost == pytest.approx(1)
    kinds = [type(option.item.pattern) for option in options]
    assert {QBoundary, Boundary2D, AShape, VerticalSlash} <= set(kinds)
    for option in options:
        parts = [scores.by_trial[t] for t in option.item.trials]
        errors = [(p.error[:, 0, n, 0] + p.answer_error[:, 0, n, 0]) / 2 for n, p in enumerate(parts)]
        assert option.error == pytest.approx(np.mean(errors))
        tiles = np.sum([p.tiles[:, 0, n, 0] for n, p in enumerate(parts)], axis=0)
        np.testing.assert_allclose(scores.tiles(option.item, 0, 0), tiles)
        dense = np.sum([scores.by_trial[DENSE].tiles[:, 0, n, 0] for n in (0, 1)], axis=0)
        assert option.cost == pytest.approx((tiles / dense).max())


def test_excluded_patterns_are_nowhere(rng):
    scores = random_scores(rng, 1, 1)
    options = scores.options(0, 0, DENSITY, excluded=frozenset({"AShape", "Boundary2D"}))
    assert not [o for o in options if "AShape" in repr(o.item.pattern) or "Boundary2D" in repr(o.item.pattern)]
    assert "QBoundary" in repr(options)


def test_more_budget_never_means_more_error_and_all_of_it_means_dense(rng):
    scores = random_scores(rng, 3, 4)
    errors = [
        choose_patterns(scores, TargetDensity(fraction=fraction), TILES).error_on(scores)
        for fraction in (0.5, 0.6, 0.8, 1.0)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0 and errors[0] > 0


def test_a_target_out_of_reach_names_what_can_be_reached():
    figures = {Dense(): ((1, 1), 0.0, 0.0), AShape(): ((0.11, 0.19), 0.2, 0.2)}
    scores = hand_made(figures, {"video": 4096, "documents": 5000})
    message = "out of reach on all of 2 prompts of 4096 to 5000 tokens: the cheapest table costs 19.0%"
    with pytest.raises(ValueError, match=message):
        choose_patterns(scores, TargetDensity(fraction=0.15), TILES)


def test_scores_are_read_per_prompt_and_old_journals_refused():
    figures = {"error": [[0.1]], "answer_error": [[0.3]], "tiles": [[5.0]]}
    rows = [{"prompt": name, "layer": 0, "trials": {DENSE.key: figures}} for name in ("a", "b")]

    def read(rows):
        return read_scores(rows, {"a": 9, "b": 7}, [DENSE], num_layers=1, modalities=(1,), blocks=Blocks())

    scores = read(rows)
    assert jax.tree.map(np.shape, scores.by_trial[DENSE]).tiles == (2, 1, 1, 1)
    assert scores.errors[DENSE] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="layer 0 of b was not measured with the trial whole"):
        read(rows[:1])
    old = {name: value for name, value in figures.items() if name != "answer_error"}
    with pytest.raises(ValueError, match="must hold error, answer_error, tiles of each trial, got error, tiles: they"):
        read([rows[0], {"prompt": "b", "layer": 0, "trials": {DENSE.key: old}}])
