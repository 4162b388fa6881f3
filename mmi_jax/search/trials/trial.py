"""A trial: one pattern put to one use on all heads, which is one sparse attention call."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Literal, get_args

from mmi_jax.method.patterns import Boundary2D, Dense, Pattern, QBoundary
from mmi_jax.method.tables import pattern_json
from mmi_jax.search.candidates import Candidates

type Step = Literal["whole", "per_query", "own", "cross", "joint"]

NUM_MODALITIES = 2
"""A boundary needs two modalities in the prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate and what it is tried for; the steps are those of the paper's Alg. 4 (section 3.3).

    | step | what the candidate plans | all else |
    |---|---|---|
    | whole | the whole prompt: No- and K-Boundary heads | |
    | per_query | the queries of each modality alone, over all keys: Q-Boundary | |
    | own | pairs of one modality (intra-modality step) | dense |
    | cross | pairs of different modalities (cross-modality step) | dense |
    | joint | nothing: it is a whole 2D-Boundary (inter-modality step) | |
    """

    step: Step
    candidate: Pattern

    def pattern(self, modalities: Sequence[int]) -> Pattern:
        """The pattern to run on a prompt with these modalities."""
        match self.step:
            case "whole" | "joint":
                return self.candidate
            case "per_query":
                return QBoundary({m: self.candidate for m in modalities})
            case "own":
                return Boundary2D({(m, m): self.candidate for m in modalities})
            case "cross":
                return Boundary2D({(m, k): self.candidate for m in modalities for k in modalities if m != k})
        raise AssertionError(self.step)

    @property
    def key(self) -> str:
        """The trial as one line of text, for files."""
        return f"{self.step} {json.dumps(pattern_json.to_json(self.candidate), sort_keys=True)}"


DENSE = Trial(step="whole", candidate=Dense())


def trial_of(key: str) -> Trial:
    """The trial that `key` wrote.

    Raises:
      ValueError: unknown step or pattern.
    """
    step, _, text = key.partition(" ")
    if step not in get_args(Step.__value__):
        raise ValueError(f"a trial must begin with one of {', '.join(get_args(Step.__value__))}, got {key!r}")
    return Trial(step=step, candidate=pattern_json.from_json(json.loads(text)))  # pyright: ignore[reportArgumentType]


def of_queries(candidate: Pattern) -> Trial:
    """The trial that says what a candidate gives the queries of one modality of a Q-Boundary head.

    Even a pattern fixed by positions needs it: rows regrouped by modality lie farther apart within a q block, which
    then visits more tiles for the same window.
    """
    return Trial(step="per_query", candidate=candidate)


def first_trials(candidates: Candidates, modalities: Sequence[int]) -> tuple[Trial, ...]:
    """The trials of the intra- and cross-modality steps, without repetition."""
    whole = [DENSE, *(Trial(step="whole", candidate=p) for p in candidates.within)]
    if len(modalities) < NUM_MODALITIES:
        return tuple(whole)
    per_query = [of_queries(p) for p in (Dense(), *candidates.within)]
    intra = [Trial(step="own", candidate=p) for p in (Dense(), *candidates.within)]
    cross = [Trial(step="cross", candidate=p) for p in candidates.across]
    return tuple(dict.fromkeys([*whole, *per_query, *intra, *cross]))
