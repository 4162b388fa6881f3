"""Scores: what every trial gave every head on every prompt; and what each head may do, with error and cost."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mmi_jax.method.patterns import Pattern, QBoundary
from mmi_jax.method.tables.cost_model import CostModel
from mmi_jax.search.budget import Option, undominated
from mmi_jax.search.measure import FIELDS, Measured
from mmi_jax.search.trials import DENSE, NUM_MODALITIES, Trial, of_queries
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A pattern of a head and the trials that say what it does to the queries of each modality."""

    pattern: Pattern
    trials: tuple[Trial, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Figures of trials on several prompts.

    An error is the mean over the prompts. Costs are kept apart, since a target holds on every prompt: where rows of
    text see everything, one with documents between its frames costs twice what a video costs.

    Args:
      modalities: of the prompts.
      lengths: tokens of each prompt, by name.
      blocks: tile sizes of the plans.
      by_trial: figures with leading axes for prompts and layers.
      weights: how much an error of each head counts, 1 on average (`head_weights`); the same for all when None.
    """

    modalities: tuple[int, ...]
    lengths: Mapping[str, int]
    blocks: Blocks
    by_trial: Mapping[Trial, Measured]
    weights: Float[np.ndarray, "l h"] | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.by_trial[DENSE].error.shape[1]

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return self.by_trial[DENSE].error.shape[3]

    def weight(self, layer: int, head: int) -> float:
        """How much an error of the head counts."""
        return 1.0 if self.weights is None else float(self.weights[layer, head])

    @property
    def dense(self) -> Choice:
        """The choice that loses nothing."""
        return Choice(pattern=DENSE.candidate, trials=(DENSE,) * len(self.modalities))

    @functools.cached_property
    def errors(self) -> Mapping[Trial, Float[np.ndarray, "l n h"]]:
        """Error of each trial by layer, modality of the query and head: the mean over prompts.

        Half of it is that of all rows, half that of the rows from which answers are read: a pattern that ruins these
        few loses every answer, and nearly nothing of the sum over all.
        """
        return {t: np.mean([m.error, m.answer_error], axis=(0, 1)) for t, m in self.by_trial.items()}

    @functools.cached_property
    def dense_tiles(self) -> Float[np.ndarray, "b l h"]:
        """Tiles that each head visits on each prompt if it is dense: heads differ in nothing but rounding."""
        return np.asarray(self.by_trial[DENSE].tiles).sum(axis=2)

    def error(self, choice: Choice, layer: int, head: int) -> float:
        """Relative squared error of the head's output: the mean over the modalities of its queries.

        Each modality counts the same, although nearly all tokens of a video prompt are vision: answers are read from
        the text, and an error on it must not vanish in the mean.
        """
        return float(np.mean([self.errors[t][layer, n, head] for n, t in enumerate(choice.trials)]))

    def weighted_error(self, choice: Choice, layer: int, head: int) -> float:
        """What the error counts when heads are held against each other."""
        return self.weight(layer, head) * self.error(choice, layer, head)

    def tiles(self, choice: Choice, layer: int, head: int) -> Float[np.ndarray, " b"]:
        """Tiles that the head visits on each prompt."""
        return np.sum([self.by_trial[t].tiles[:, layer, n, head] for n, t in enumerate(choice.trials)], axis=0)

    def tile_share(self, trial: Trial, layer: int, n: int, head: int) -> Float[np.ndarray, " b"]:
        """Tiles of the queries of modality number `n` on each prompt, over all those of a dense head."""
        return np.asarray(self.by_trial[trial].tiles)[:, layer, n, head] / self.dense_tiles[:, layer, head]

    def cost(self, costs: CostModel, choice: Choice, layer: int, head: int) -> Float[np.ndarray, " b"]:
        """Milliseconds that the head adds to its layer's call on each prompt."""
        return self._priced(costs, choice.pattern, self.tiles(choice, layer, head))

    def dense_cost(self, costs: CostModel) -> Float[np.ndarray, " b"]:
        """Milliseconds of a dense head on each prompt."""
        return self._priced(costs, DENSE.candidate, self.dense_tiles.mean(axis=(1, 2)))

    def _priced(self, costs: CostModel, pattern: Pattern, tiles: Float[np.ndarray, " b"]) -> Float[np.ndarray, " b"]:
        return np.asarray(costs.head_of(pattern, tiles, np.array(list(self.lengths.values())), self.blocks))

    def option(self, choice: Choice, layer: int, head: int, costs: CostModel) -> Option:
        """The choice with its weighted error, and its cost where it is dearest, in dense heads of that prompt.

        Heads that are dearest on different prompts count with more than they cost together on any of them, so that a
        budget of dense heads holds on every prompt, of whatever length.
        """
        dense = self._priced(costs, DENSE.candidate, self.dense_tiles[:, layer, head])
        shares = self.cost(costs, choice, layer, head) / dense
        return Option(what=choice, error=self.weighted_error(choice, layer, head), cost=float(shares.max()))

    def options(
        self, layer: int, head: int, costs: CostModel, *, excluded: frozenset[str] = frozenset()
    ) -> list[Option]:
        """What the head may do: Dense always; whole, Q-Boundary and 2D-Boundary patterns whose trials are here.

        A Q-Boundary head's error needs no trial of its own: queries of different modalities share nothing, so its rows
        are those of the trials of its inner patterns, and so are its tiles.

        Args:
          excluded: names of patterns that a head must not have, neither as its own nor inside a boundary.
        """
        choices = [self.dense]
        for trial in self.by_trial:
            if trial.step in ("whole", "joint") and not is_excluded(trial.candidate, excluded):
                choices.append(Choice(pattern=trial.candidate, trials=(trial,) * len(self.modalities)))
        if len(self.modalities) >= NUM_MODALITIES and "QBoundary" not in excluded:
            choices += self._by_query(layer, head, excluded)
        return [self.option(choice, layer, head, costs) for choice in choices]

    def _by_query(self, layer: int, head: int, excluded: frozenset[str]) -> list[Choice]:
        """Q-Boundary choices of patterns that are undominated for the queries of their modality.

        Their tiles count as an option's cost does: with the largest share, over the prompts, of a dense head's.
        """
        per_modality = []
        candidates = [t.candidate for t in self.by_trial if t.step == "per_query"]
        candidates = [p for p in candidates if not is_excluded(p, excluded)]
        for n in range(len(self.modalities)):
            options = [
                Option(
                    what=p,
                    error=float(self.errors[of_queries(p)][layer, n, head]),
                    cost=float(self.tile_share(of_queries(p), layer, n, head).max()),
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
    rows: Iterable[Mapping[str, Any]], lengths: Mapping[str, int], trials: Iterable[Trial], *, num_layers: int,
    modalities: tuple[int, ...], blocks: Blocks, weights: Float[np.ndarray, "l h"] | None = None,
) -> Scores:  # fmt: skip
    """What a journal's rows say of the trials on the prompts that `lengths` names.

    Raises:
      ValueError: a prompt's layer lacks a trial, or the rows are those of a search that measured something else.
    """
    found = trials_of_rows(rows)
    by_trial = {}
    for trial in dict.fromkeys(trials):
        pieces = [[found.get((name, layer), {}).get(trial.key) for layer in range(num_layers)] for name in lengths]
        for name, layers in zip(lengths, pieces, strict=True):
            if None in layers:
                raise ValueError(f"layer {layers.index(None)} of {name} was not measured with the trial {trial.key}")
        by_trial[trial] = Measured(**{
            field: np.array([[piece[field] for piece in layers if piece] for layers in pieces]) for field in FIELDS
        })  # fmt: skip
    return Scores(modalities=modalities, lengths=dict(lengths), blocks=blocks, by_trial=by_trial, weights=weights)


def trials_of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Figures by trial key, of each prompt and layer.

    Raises:
      ValueError: the figures are not those that a search measures now.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        if "trials" not in row:
            continue  # of another kind
        found.setdefault((row["prompt"], row["layer"]), {}).update(row["trials"])
        for figures in row["trials"].values():
            if set(figures) != set(FIELDS):
                raise ValueError(
                    f"the pieces of a search must hold {', '.join(FIELDS)} of each trial, got {', '.join(figures)}: "
                    "they are another version's; name another work file or delete this one"
                )
    return found
