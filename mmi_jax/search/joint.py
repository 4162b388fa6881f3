"""The inter-modality step: which whole 2D-Boundary patterns are worth a trial, given the steps before.

A head's 2D-Boundary has a pattern for each pair of modalities; trying all combinations is out of the question. The own
and cross steps say what each pair costs and loses while all else is dense, and their sums foretell a combination well
enough to choose which to try; what is tried is then measured as a whole.
"""

from collections import defaultdict

import numpy as np

from mmi_jax.patterns import Boundary2D, Dense, Pattern
from mmi_jax.search.costs import DENSITY
from mmi_jax.search.scores import Scores
from mmi_jax.search.trials import DENSE, NUM_MODALITIES, Trial

PRICES = (0.01, 0.03, 0.1, 0.3)
"""Error that a head may make to save all of its tiles: one combination is foretold for each price and head."""

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
            dense = float(scores.by_trial[DENSE].tiles[layer, :, head].sum())
            others = [(o.error, scores.tiles(o.what, layer, head) / dense)
                      for o in scores.options(layer, head, DENSITY)]  # fmt: skip
            for price in PRICES:
                inner: dict[tuple[int, int], Pattern] = {}
                total = 0.0
                for n, m in enumerate(modalities):
                    within, loss = _best(scores, own, layer, n, head, price / dense)
                    across, cross_loss = _best(scores, cross, layer, n, head, price / dense)
                    base = float(scores.by_trial[OWN_DENSE].tiles[layer, n, head])
                    total += loss + cross_loss - price * base / dense  # both sums hold the dense rest once
                    inner |= {(m, k): within if m == k else across for k in modalities}
                best_other = min(error + price * share for error, share in others)
                if total < best_other and set(inner.values()) != {Dense()}:
                    gains[Boundary2D(inner)] += best_other - total
    ranked = sorted(gains, key=lambda pattern: (-gains[pattern], repr(pattern)))
    return tuple(Trial(step="joint", candidate=pattern) for pattern in ranked[:most])


def _best(scores: Scores, trials, layer: int, n: int, head: int, price_per_tile: float) -> tuple[Pattern, float]:
    """The candidate with the least error plus price for the queries of modality number `n`, and that sum."""
    share = 1 / len(scores.modalities)
    losses = [
        share * float(scores.by_trial[t].error[layer, n, head])
        + price_per_tile * float(scores.by_trial[t].tiles[layer, n, head])
        for t in trials
    ]
    least = int(np.argmin(losses))
    return trials[least].candidate, losses[least]
