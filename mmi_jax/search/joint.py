"""The inter-modality step: which whole 2D-Boundary patterns are worth a trial, given the steps before.

A head's 2D-Boundary has a pattern for each pair of modalities; trying all combinations is out of the question. The own
and cross steps say what each pair costs and loses while all else is dense, and their sums foretell a combination well
enough to choose which to try; what is tried is then measured as a whole.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mmi_jax.method.patterns import Boundary2D, Dense, Pattern
from mmi_jax.search.costs import DENSITY
from mmi_jax.search.scores import Scores
from mmi_jax.search.trials import NUM_MODALITIES, Trial

PRICES = (0.01, 0.03, 0.1, 0.3)
"""Weighted error that a head may make to save all of its tiles: one combination is foretold for each price and head."""

OWN_DENSE = Trial(step="own", candidate=Dense())


def joint_trials(scores: Scores, most: int) -> tuple[Trial, ...]:
    """At most `most` whole 2D-Boundary patterns: those foretold to gain most, summed over heads and prices.

    A gain is counted against the best of the whole and Q-Boundary patterns of the same head.
    """
    modalities = scores.modalities
    if len(modalities) < NUM_MODALITIES or OWN_DENSE not in scores.by_trial:
        return ()
    own = [t for t in scores.by_trial if t.step == "own"]
    cross = [OWN_DENSE, *(t for t in scores.by_trial if t.step == "cross")]
    gains: dict[Boundary2D, float] = defaultdict(float)
    for layer in range(scores.num_layers):
        for head in range(scores.num_heads):
            others, weight = scores.options(layer, head, DENSITY), scores.weight(layer, head)
            for price in PRICES:
                inner: dict[tuple[int, int], Pattern] = {}
                error, share = 0.0, np.zeros(len(scores.lengths))  # of a dense head, on each prompt
                for n, m in enumerate(modalities):
                    within = _best(scores, own, layer, n, head, price / weight)
                    across = _best(scores, cross, layer, n, head, price / weight)
                    inner |= {(m, k): (within if m == k else across).candidate for k in modalities}
                    for trial, sign in ((within, 1), (across, 1), (OWN_DENSE, -1)):  # the dense rest is in both trials
                        error += sign * float(scores.errors[trial][layer, n, head]) / len(modalities)
                        share += sign * scores.tile_share(trial, layer, n, head)
                total = weight * error + price * float(share.max())
                best_other = min(option.error + price * option.cost for option in others)
                if total < best_other and set(inner.values()) != {Dense()}:
                    gains[Boundary2D(inner)] += best_other - total
    ranked = sorted(gains, key=lambda pattern: (-gains[pattern], repr(pattern)))
    return tuple(Trial(step="joint", candidate=pattern) for pattern in ranked[:most])


def _best(scores: Scores, trials: Sequence[Trial], layer: int, n: int, head: int, price: float) -> Trial:
    """The trial with the least error plus price for the queries of modality number `n`, on its dearest prompt."""
    losses = [
        scores.errors[t][layer, n, head] / len(scores.modalities) + price * scores.tile_share(t, layer, n, head).max()
        for t in trials
    ]
    return trials[int(np.argmin(losses))]
