"""The inter-modality step: which whole 2D-Boundary patterns are worth a trial, given the steps before.

A head's 2D-Boundary has a pattern for each pair of modalities; trying all combinations is out of the question. The own
and cross steps say what each pair costs and what error it makes while all else is dense, and their sums predict a
combination well enough to choose which to try; what is tried is then measured as a whole.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mmi_jax.method.patterns import Boundary2D, Dense, Pattern
from mmi_jax.search.costs import DENSITY
from mmi_jax.search.scores import Scores
from mmi_jax.search.trials.trial import NUM_MODALITIES, Trial

PRICES = (0.01, 0.03, 0.1, 0.3)
"""Weighted error that a head may make to save all of its tiles: one combination is predicted for each price and head.
A factor of about three apart, from an error that hardly counts to one that no head should make."""

INTRA_DENSE = Trial(step="own", candidate=Dense())


def joint_trials(scores: Scores, max_trials: int) -> tuple[Trial, ...]:
    """The whole 2D-Boundary patterns that are predicted to gain most, summed over heads and prices.

    A gain is counted against the best of the whole and Q-Boundary patterns of the same head.
    """
    if len(scores.modalities) < NUM_MODALITIES or INTRA_DENSE not in scores.by_trial:
        return ()
    gains: dict[Boundary2D, float] = defaultdict(float)
    for layer in range(scores.num_layers):
        for head in range(scores.num_heads):
            others, weight = scores.options(layer, head, DENSITY), scores.weight(layer, head)
            for price in PRICES:
                pattern, error, tiles = _predicted(scores, layer, head, price / weight)
                total = weight * error + price * tiles
                best_other = min(option.error + price * option.cost for option in others)
                if total < best_other and set(pattern.inner.values()) != {Dense()}:
                    gains[pattern] += best_other - total
    ranked = sorted(gains, key=lambda pattern: (-gains[pattern], repr(pattern)))
    return tuple(Trial(step="joint", candidate=pattern) for pattern in ranked[:max_trials])


def _predicted(scores: Scores, layer: int, head: int, price: float) -> tuple[Boundary2D, float, float]:
    """The combination of the best pairs at a price of tiles; its predicted error, and tiles as a fraction of dense."""
    intra = [trial for trial in scores.by_trial if trial.step == "own"]
    cross = [INTRA_DENSE, *(trial for trial in scores.by_trial if trial.step == "cross")]
    inner: dict[tuple[int, int], Pattern] = {}
    error, tiles = 0.0, np.zeros(len(scores.lengths))  # of a dense head, on each prompt
    for n, m in enumerate(scores.modalities):
        within = _best_trial(scores, intra, layer, n, head, price)
        across = _best_trial(scores, cross, layer, n, head, price)
        inner |= {(m, k): (within if m == k else across).candidate for k in scores.modalities}
        for trial, sign in ((within, 1), (across, 1), (INTRA_DENSE, -1)):  # the dense rest is in both trials
            error += sign * float(scores.errors[trial][layer, n, head]) / len(scores.modalities)
            tiles += sign * scores.tile_fraction(trial, layer, n, head)
    return Boundary2D(inner), error, float(tiles.max())


def _best_trial(scores: Scores, trials: Sequence[Trial], layer: int, n: int, head: int, price: float) -> Trial:
    """The trial with the least error plus price for the queries of modality number `n`, on its worst prompt."""
    losses = [
        scores.errors[t][layer, n, head] / len(scores.modalities)
        + price * scores.tile_fraction(t, layer, n, head).max()
        for t in trials
    ]
    return trials[int(np.argmin(losses))]
