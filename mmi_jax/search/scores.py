"""Scores: the metrics of all trials on several prompts, and from them each head's options with error and cost."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mmi_jax.method.patterns import Boundary2D, Pattern, QBoundary
from mmi_jax.method.tables.cost_model import CostModel
from mmi_jax.search.knapsack import Option, pareto_optimal
from mmi_jax.search.trials.journal import JournalEntry
from mmi_jax.search.trials.measurement import METRICS, TrialMetrics
from mmi_jax.search.trials.trial import DENSE, NUM_MODALITIES, Trial, of_queries
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A pattern of a head, and for the queries of each modality the trial that measured it."""

    pattern: Pattern
    trials: tuple[Trial, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Metrics of trials on several prompts.

    An error is the mean over the prompts. Costs are kept apart, since a target holds on every prompt: where rows of
    text see everything, one with documents between its frames costs twice what a video costs.

    Args:
      modalities: of the prompts.
      lengths: tokens of each prompt, by name.
      blocks: tile sizes of the plans.
      by_trial: metrics with leading axes for prompts and layers.
      weights: how much an error of each head counts, 1 on average (`head_weights`); the same for all when None.
    """

    modalities: tuple[int, ...]
    lengths: Mapping[str, int]
    blocks: Blocks
    by_trial: Mapping[Trial, TrialMetrics]
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
        """The choice without error."""
        return Choice(pattern=DENSE.candidate, trials=(DENSE,) * len(self.modalities))

    @functools.cached_property
    def errors(self) -> Mapping[Trial, Float[np.ndarray, "l n h"]]:
        """Error of each trial by layer, modality of the query and head: the mean over prompts.

        Half of it is that of all rows, half that of the rows from which answers are read: a pattern that ruins these
        few loses every answer, and changes the sum over all by nearly nothing.
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
        """What the error counts when heads compete for one budget."""
        return self.weight(layer, head) * self.error(choice, layer, head)

    def tiles(self, choice: Choice, layer: int, head: int) -> Float[np.ndarray, " b"]:
        """Tiles that the head visits on each prompt."""
        return np.sum([self.by_trial[t].tiles[:, layer, n, head] for n, t in enumerate(choice.trials)], axis=0)

    def tile_fraction(self, trial: Trial, layer: int, n: int, head: int) -> Float[np.ndarray, " b"]:
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

    def option(self, choice: Choice, layer: int, head: int, costs: CostModel) -> Option[Choice]:
        """The choice with its weighted error, and its worst cost over the prompts, in dense heads of that prompt.

        Heads that are most expensive on different prompts count with more than they cost together on any of them, so
        that a budget of dense heads holds on every prompt, of whatever length.
        """
        dense = self._priced(costs, DENSE.candidate, self.dense_tiles[:, layer, head])
        relative = self.cost(costs, choice, layer, head) / dense
        return Option(item=choice, error=self.weighted_error(choice, layer, head), cost=float(relative.max()))

    def options(
        self, layer: int, head: int, costs: CostModel, *, excluded: frozenset[str] = frozenset()
    ) -> list[Option[Choice]]:
        """What the head may do: Dense always; whole, Q-Boundary and 2D-Boundary patterns whose trials are here.

        A Q-Boundary head's error needs no further trial: queries of different modalities have nothing in common, so
        its rows are those of the trials of its inner patterns, and so are its tiles.

        Args:
          excluded: names of patterns that a head must not have, neither whole nor inside a boundary.
        """
        choices = [self.dense]
        for trial in self.by_trial:
            if trial.step in ("whole", "joint") and not is_excluded(trial.candidate, excluded):
                choices.append(Choice(pattern=trial.candidate, trials=(trial,) * len(self.modalities)))
        if len(self.modalities) >= NUM_MODALITIES and "QBoundary" not in excluded:
            choices += self._by_query(layer, head, excluded)
        return [self.option(choice, layer, head, costs) for choice in choices]

    def _by_query(self, layer: int, head: int, excluded: frozenset[str]) -> list[Choice]:
        """Q-Boundary choices of patterns that are Pareto-optimal for the queries of their modality.

        Their tiles count as an option's cost does: with the largest fraction, over the prompts, of a dense head's.
        """
        per_modality = []
        candidates = [t.candidate for t in self.by_trial if t.step == "per_query"]
        candidates = [p for p in candidates if not is_excluded(p, excluded)]
        for n in range(len(self.modalities)):
            options = [
                Option(
                    item=p,
                    error=float(self.errors[of_queries(p)][layer, n, head]),
                    cost=float(self.tile_fraction(of_queries(p), layer, n, head).max()),
                )
                for p in sorted(candidates, key=repr)
            ]
            per_modality.append([option.item for option in pareto_optimal(options)])
        return [
            Choice(
                pattern=QBoundary(dict(zip(self.modalities, chosen, strict=True))),
                trials=tuple(map(of_queries, chosen)),
            )
            for chosen in itertools.product(*per_modality)
        ]


def is_excluded(pattern: Pattern, names: frozenset[str]) -> bool:
    """Whether the pattern or one inside it bears one of the names."""
    inner = pattern.inner.values() if isinstance(pattern, QBoundary | Boundary2D) else ()
    return any(type(p).__name__ in names for p in (pattern, *inner))


def read_scores(
    entries: Iterable[JournalEntry],
    lengths: Mapping[str, int],
    trials: Iterable[Trial],
    *,
    num_layers: int,
    modalities: tuple[int, ...],
    blocks: Blocks,
    weights: Float[np.ndarray, "l h"] | None = None,
) -> Scores:
    """The scores of the trials on the prompts that `lengths` names, from a journal's entries.

    Raises:
      ValueError: a prompt's layer lacks a trial, or the entries are those of a search that measured something else.
    """
    metrics = metrics_by_trial(entries)
    by_trial = {}
    for trial in dict.fromkeys(trials):
        by_prompt = []
        for name in lengths:
            layers = [metrics.get((name, layer), {}).get(trial.key) for layer in range(num_layers)]
            if None in layers:
                raise ValueError(f"layer {layers.index(None)} of {name} was not measured with the trial {trial.key}")
            by_prompt.append([layer for layer in layers if layer is not None])
        by_trial[trial] = _stacked(by_prompt)
    return Scores(modalities=modalities, lengths=dict(lengths), blocks=blocks, by_trial=by_trial, weights=weights)


def _stacked(by_prompt: Sequence[Sequence[Mapping[str, list]]]) -> TrialMetrics:
    """The metrics of a trial with leading axes for prompts and layers."""
    return TrialMetrics(**{name: np.array([[m[name] for m in layers] for layers in by_prompt]) for name in METRICS})


def metrics_by_trial(entries: Iterable[JournalEntry]) -> dict[tuple[str, int], dict[str, dict[str, list]]]:
    """Metrics by trial key, of each prompt and layer.

    Raises:
      ValueError: the metrics are not those that a search measures now.
    """
    metrics: dict[tuple[str, int], dict[str, dict[str, list]]] = {}
    for entry in entries:
        if "trials" not in entry:
            continue  # of another kind
        metrics.setdefault((entry["prompt"], entry["layer"]), {}).update(entry["trials"])
        for of_trial in entry["trials"].values():
            if set(of_trial) != set(METRICS):
                raise ValueError(
                    f"the pieces of a search must hold {', '.join(METRICS)} of each trial, got {', '.join(of_trial)}: "
                    "they are another version's; name another work file or delete this one"
                )
    return metrics
