"""Scores: what every trial gave every head, averaged over prompts; and what each head may do, with error and cost."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmi_jax.blocks import Blocks
from mmi_jax.cost import CostModel
from mmi_jax.patterns import Pattern, QBoundary
from mmi_jax.search.budget import Option, undominated
from mmi_jax.search.measure import Measured
from mmi_jax.search.trials import DENSE, NUM_MODALITIES, Trial, of_queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A pattern of a head and the trials that say what it does to the queries of each modality."""

    pattern: Pattern
    trials: tuple[Trial, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Means over prompts.

    Args:
      modalities: of the prompts.
      num_tokens: mean length of the prompts.
      blocks: tile sizes of the plans.
      by_trial: figures with a leading layer axis.
    """

    modalities: tuple[int, ...]
    num_tokens: int
    blocks: Blocks
    by_trial: Mapping[Trial, Measured]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.by_trial[DENSE].error.shape[0]

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return self.by_trial[DENSE].error.shape[2]

    def error(self, choice: Choice, layer: int, head: int) -> float:
        """Relative squared error of the head's output: the mean over the modalities of its queries.

        Each modality counts the same, although nearly all tokens of a video prompt are vision: answers are read from
        the text, and an error on it must not vanish in the mean.
        """
        return float(np.mean([self._of(t).error[layer, n, head] for n, t in enumerate(choice.trials)]))

    def tiles(self, choice: Choice, layer: int, head: int) -> float:
        """Tiles that the head visits."""
        return float(np.sum([self._of(t).tiles[layer, n, head] for n, t in enumerate(choice.trials)]))

    def cost(self, costs: CostModel, choice: Choice, layer: int, head: int) -> float:
        """Milliseconds that the head adds to its layer's call."""
        tiles = self.tiles(choice, layer, head)
        return float(costs.head_of(choice.pattern, tiles, self.num_tokens, self.blocks))

    def _of(self, trial: Trial) -> Measured:
        return self.by_trial[trial]

    def options(
        self, layer: int, head: int, costs: CostModel, *, excluded: frozenset[str] = frozenset()
    ) -> list[Option]:
        """What the head may do: Dense always; whole, Q-Boundary and 2D-Boundary patterns whose trials are here.

        A Q-Boundary head's error needs no trial of its own: queries of different modalities share nothing, so its rows
        are those of the trials of its inner patterns, and so are its tiles.

        Args:
          excluded: names of patterns that a head must not have, neither as its own nor inside a boundary.
        """
        choices = [Choice(pattern=DENSE.candidate, trials=(DENSE,) * len(self.modalities))]
        for trial in self.by_trial:
            if trial.step in ("whole", "joint") and not is_excluded(trial.candidate, excluded):
                choices.append(Choice(pattern=trial.candidate, trials=(trial,) * len(self.modalities)))
        if len(self.modalities) >= NUM_MODALITIES and "QBoundary" not in excluded:
            choices += self._by_query(layer, head, excluded)
        return [
            Option(what=c, error=self.error(c, layer, head), cost=self.cost(costs, c, layer, head)) for c in choices
        ]

    def _by_query(self, layer: int, head: int, excluded: frozenset[str]) -> list[Choice]:
        """Q-Boundary choices of patterns that are undominated for the queries of their modality."""
        per_modality = []
        candidates = [t.candidate for t in self.by_trial if t.step == "per_query"]
        candidates = [p for p in candidates if not is_excluded(p, excluded)]
        for n in range(len(self.modalities)):
            options = [
                Option(
                    what=p,
                    error=float(self._of(of_queries(p)).error[layer, n, head]),
                    cost=float(self._of(of_queries(p)).tiles[layer, n, head]),
                )
                for p in sorted(candidates, key=repr)
            ]
            per_modality.append([option.what for option in undominated(options)])
        return [
            Choice(
                pattern=QBoundary(dict(zip(self.modalities, chosen, strict=True))),
                trials=tuple(map(of_queries, chosen)),
            )
            for chosen in itertools.product(*per_modality)
        ]


def is_excluded(pattern: Pattern, names: frozenset[str]) -> bool:
    """Whether the pattern or one inside it bears one of the names."""
    inner: Iterable[Any] = getattr(pattern, "inner", {}).values()
    return type(pattern).__name__ in names or any(type(p).__name__ in names for p in inner)


def read_scores(
    rows: Iterable[Mapping[str, Any]], names: Sequence[str], trials: Iterable[Trial], *, num_layers: int,
    modalities: tuple[int, ...], num_tokens: int, blocks: Blocks,
) -> Scores:  # fmt: skip
    """The mean over the named prompts of what a journal's rows say of the trials.

    Raises:
      ValueError: a prompt's layer lacks a trial.
    """
    found = trials_of_rows(rows)
    by_trial = {}
    for trial in dict.fromkeys(trials):
        layers = []
        for layer in range(num_layers):
            figures = [found.get((name, layer), {}).get(trial.key) for name in names]
            if None in figures:
                missing = names[figures.index(None)]
                raise ValueError(f"layer {layer} of {missing} was not measured with the trial {trial.key}")
            layers.append(Measured(**{
                field: np.mean([np.asarray(f[field]) for f in figures if f is not None], axis=0)
                for field in ("error", "tiles")
            }))  # fmt: skip
        by_trial[trial] = Measured(
            error=np.stack([np.asarray(m.error) for m in layers]), tiles=np.stack([np.asarray(m.tiles) for m in layers])
        )
    return Scores(modalities=modalities, num_tokens=num_tokens, blocks=blocks, by_trial=by_trial)


def trials_of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Figures by trial key, of each prompt and layer."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["prompt"], row["layer"]), {}).update(row["trials"])
    return found
