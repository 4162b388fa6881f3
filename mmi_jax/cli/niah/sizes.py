"""Sizes of the baselines of `mmi niah`: each costs what the matched method costs on the same task and length."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mmi_jax import Blocks
from mmi_jax.cli.niah.answers import PromptBatch, evaluate
from mmi_jax.cli.niah.journal_entries import MATCHED_COST, matched_fractions
from mmi_jax.cli.niah.options import NiahOptions
from mmi_jax.cli.samples import SampleSource
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.tables import pattern_json
from mmi_jax.method.tables.cost_model import CostModel
from mmi_jax.search.activations import layer_activations
from mmi_jax.search.baselines.equal_cost import PlanInputs, member_at_cost
from mmi_jax.search.baselines.families import ladder_of, published_pattern
from mmi_jax.search.trials.journal import Journal

NUM_LAYERS_LOOKED_AT = 4
"""Layers, evenly over the depth, on whose queries and keys a size is chosen; what it cost is counted in all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The baselines of every task and length, chosen once and recorded in the journal.

    A size is never taken over from another task: what a baseline costs depends on the prompts, as ours does.
    """

    options: NiahOptions
    model: VisionLanguageModel
    source: SampleSource
    costs: CostModel
    journal: Journal

    def fit(self, methods: Sequence[str], name: str, tokens: int, batch: PromptBatch) -> dict[str, Pattern]:
        """The baselines of a task and a length; those not in the journal are sized on the first prompt."""
        place = {"task": name, "tokens": tokens}
        rows = self.journal.matching(kind="size", **place)
        patterns = {row["method"]: pattern_json.from_json(row["pattern"]) for row in rows if row["method"] in methods}
        if missing := [method for method in methods if method not in patterns]:
            fraction = self._cost_to_match(name, tokens, batch)
            for method, (pattern, counted) in zip(missing, self._sized(missing, tokens, fraction, batch), strict=True):
                row = {"kind": "size", **place, "method": method, "fraction": fraction, "counted": counted}
                self.journal.add(row | {"pattern": pattern_json.to_json(pattern)})
                patterns[method] = pattern
        return patterns

    def _cost_to_match(self, name: str, tokens: int, batch: PromptBatch) -> float | None:
        """What the matched method costs there, of dense attention, from its own cell; evaluated if it has none."""
        method = self.options.matched_method
        if method is None:
            return None
        place = {"task": name, "tokens": tokens, "method": method}
        for cell in self.journal.matching(kind="cell", **place):
            return cell["cost"] / cell["dense_cost"]
        for fraction in matched_fractions(self.journal, **place).values():
            return fraction
        answers = evaluate(self.model, [batch], self.options.tables.get(method), self.costs)
        fraction = answers.cost / answers.dense_cost
        self.journal.add({"kind": MATCHED_COST, **place, "fraction": fraction})
        return fraction

    def _sized(
        self, methods: Sequence[str], tokens: int, fraction: float | None, batch: PromptBatch
    ) -> list[tuple[Pattern, float | None]]:
        """Members of families of this cost, as a fraction of dense, and the counted cost; else those of the paper."""
        if fraction is None:
            return [(published_pattern(method, self.source.measure.grid), None) for method in methods]
        layers = self._layers(batch)

        def member(method: str) -> tuple[Pattern, float]:
            # The ladder is that of the nominal length, so that tasks try the same members and use the same programs.
            return member_at_cost(ladder_of(method, tokens), fraction, layers, self.costs, Blocks())

        with ThreadPoolExecutor(max_workers=len(methods)) as pool:  # compiling takes most of it, and little memory
            return list(pool.map(member, methods))

    def _layers(self, batch: PromptBatch) -> list[PlanInputs]:
        """What plans read of the layers looked at."""
        numbers = layers_looked_at(self.model.config.num_layers)
        prompt = self.source.processor(list(batch.samples[0].parts), cuts_on_device=True)
        layers = layer_activations(self.model, prompt, blocks=Blocks(), num_layers=numbers[-1] + 1)
        return [PlanInputs(x.q, x.k, x.layout) for n, x in enumerate(layers) if n in numbers]


def layers_looked_at(num_layers: int) -> list[int]:
    """Numbers of layers evenly over the depth, each in the middle of an equal part: 1, 3, 5, 7 of 8."""
    count = min(NUM_LAYERS_LOOKED_AT, num_layers)
    return [int((n + 0.5) * num_layers / count) for n in np.arange(count)]
