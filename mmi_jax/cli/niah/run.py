"""The grid of `mmi niah`: its cells one by one, and the results."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mmi_jax import PatternTable
from mmi_jax.cli import console
from mmi_jax.cli.digest import run_on
from mmi_jax.cli.niah.answers import PromptBatch, evaluate, prompt_batches
from mmi_jax.cli.niah.options import NiahOptions
from mmi_jax.cli.niah.results import remember_methods, write_results
from mmi_jax.cli.niah.sizes import Sizes
from mmi_jax.cli.samples import SampleSource, haystack_of
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.tables import pattern_json
from mmi_jax.method.tables.cost_model import CostModel
from mmi_jax.search.costs import cost_models, default_costs
from mmi_jax.search.trials.journal import Journal
from models import open_checkpoint

QUESTIONS = 4
"""Questions of a sample at most; every prefill has rows for so many."""

type Place = tuple[str, int, int]
"""Task, length in tokens, and number of the depth."""

type Methods = Mapping[str, PatternTable | Pattern | None]
"""What methods run."""

VERSION = 4
"""Of what the tasks' samples show and of how sizes are chosen: cells of another are refused."""

SAMPLES_AHEAD = 2
"""Cells whose samples are being made while another's are evaluated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
    """A model, the samples for it, and the journal of what is done.

    Args:
      warmed: programs that are compiled: method, pattern and padded length.
    """

    options: NiahOptions
    model: VisionLanguageModel
    source: SampleSource
    costs: CostModel
    journal: Journal
    warmed: set[tuple[str, str, int]] = dataclasses.field(default_factory=set)

    def batches(self, name: str, tokens: int, depth_number: int) -> list[PromptBatch]:
        """The samples of one cell, the same for every method."""
        depth = self.options.depths[depth_number]
        seeds = self.options.seeds(depth_number)
        samples = [self.source.sample(name, num_tokens=tokens, depth=depth, seed=seed) for seed in seeds]
        return prompt_batches(self.source.processor, samples, batch=self.options.batch, num_rows=QUESTIONS)

    def missing(self, place: Place, methods: Sequence[str]) -> list[str]:
        """Those that have no cell in a place."""
        return [method for method in methods if not self.journal.matching(**self._key(place, method))]

    def fill(self, place: Place, batches: Sequence[PromptBatch], on_step: Callable[[str], None]) -> None:
        """The missing cells of a place; the baselines last, as the matched method's cell decides their sizes."""
        given = self.missing(place, self.options.fixed_methods)
        self._evaluate_all(place, {method: self.options.tables.get(method) for method in given}, batches, on_step)
        if baselines := self.missing(place, self.options.baselines):
            on_step("sizes of baselines")
            name, tokens, _ = place
            self._evaluate_all(place, self._sizes.fit(baselines, name, tokens, batches[0]), batches, on_step)

    @property
    def _sizes(self) -> Sizes:
        return Sizes(options=self.options, model=self.model, source=self.source, costs=self.costs, journal=self.journal)

    def _evaluate_all(
        self, place: Place, patterns: Methods, batches: Sequence[PromptBatch], on_step: Callable[[str], None]
    ) -> None:
        """A cell of each method."""
        self._warm(patterns, batches, on_step)
        for method, pattern in patterns.items():
            on_step(method)
            cell = self._key(place, method) | self._evaluate(batches, pattern) | {"pattern": _named(pattern)}
            self.journal.add(cell)

    def _warm(self, patterns: Methods, batches: Sequence[PromptBatch], on_step: Callable[[str], None]) -> None:
        """Compiles the programs of several methods in parallel, which takes the memory of as many prefills."""
        length = Buckets().length_for(batches[0].prompt.tokens.shape[1])
        programs = {method: (method, _named(pattern), length) for method, pattern in patterns.items()}
        cold = [method for method, program in programs.items() if program not in self.warmed]
        if cold and self.options.parallel_compilations > 1:
            on_step("compiling")
            with ThreadPoolExecutor(max_workers=self.options.parallel_compilations) as pool:
                list(pool.map(lambda method: self._evaluate(batches[:1], patterns[method]), cold))
        self.warmed.update(programs.values())

    def _evaluate(self, batches: Sequence[PromptBatch], pattern: PatternTable | Pattern | None) -> dict[str, Any]:
        """The figures of some samples under one method."""
        return dataclasses.asdict(evaluate(self.model, batches, pattern, self.costs))

    def _key(self, place: Place, method: str) -> dict[str, Any]:
        """What names a cell of one method."""
        name, tokens, number = place
        return {"kind": "cell", "task": name, "tokens": tokens, "depth": self.options.depths[number], "method": method}


def run_niah(options: NiahOptions) -> None:
    """Fills the grid, writes CSV, JSON and heat maps into the output directory, and prints the means.

    What is written holds all cells of the output directory, those of methods, tasks and lengths of earlier runs too.

    Raises:
      ValueError: the model, haystack or journal cannot be used, or the prompts are too short for a task.
    """
    checkpoint = open_checkpoint(options.model)
    source = SampleSource(processor=checkpoint.read_processor(), haystack=haystack_of(options.haystack))
    for name, tokens in itertools.product(options.tasks, options.tokens):  # refused now rather than after an hour
        for seed in options.seeds(0):
            source.script(name, num_tokens=tokens, depth=0.5, seed=seed)
    cost_name = options.cost_model or default_costs()
    options.output.mkdir(parents=True, exist_ok=True)
    run = _run_of(options, checkpoint.directory, cost_name)
    journal = Journal(options.output / "cells.jsonl", run)
    with console.progress_bar("loading weights", "tensors") as on_tensor:
        model = checkpoint.load_model(dtype=jnp.dtype(options.dtype), on_tensor=on_tensor)
    for table in options.tables.values():
        table.check_fits(num_layers=model.config.num_layers, num_heads=model.config.num_heads)
    runner = Runner(options=options, model=model, source=source, costs=cost_models()[cost_name], journal=journal)
    remember_methods(journal, options.methods)
    with console.work_bar("cells") as on_cell:
        _fill(runner, on_cell)
    write_results(options, journal)


def _fill(runner: Runner, on_cell: Callable[[int, int, str], None]) -> None:
    """Every cell, in the order of task, length and depth; the next samples are made while these are evaluated."""
    options, journal = runner.options, runner.journal
    places = list(itertools.product(options.tasks, options.tokens, range(len(options.depths))))
    missing = {place: runner.missing(place, options.methods) for place in places}
    total, unfilled = len(places) * len(options.methods), [place for place in places if missing[place]]
    of_others = len(journal.matching(kind="cell")) - (total - sum(map(len, missing.values())))
    with ThreadPoolExecutor(max_workers=SAMPLES_AHEAD) as pool:
        coming = [pool.submit(runner.batches, *place) for place in unfilled[:SAMPLES_AHEAD]]
        for n, (name, tokens, number) in enumerate(unfilled):
            what = f"{name}, {tokens} tokens, depth {options.depths[number]:.2f}"

            def on_step(step: str, what=what) -> None:
                on_cell(len(journal.matching(kind="cell")) - of_others, total, f"{step}: {what}")

            on_step("samples")
            batches = coming.pop(0).result()
            coming += [pool.submit(runner.batches, *p) for p in unfilled[n + SAMPLES_AHEAD : n + SAMPLES_AHEAD + 1]]
            runner.fill((name, tokens, number), batches, on_step)
    on_cell(total, total, "done")


def _named(table: PatternTable | Pattern | None) -> str:
    """A method's pattern as text."""
    if table is None:
        return "Dense()"
    return "a table" if isinstance(table, PatternTable) else repr(table)


def _run_of(options: NiahOptions, directory: Path, cost_name: str) -> dict[str, Any]:
    """What the cells depend on besides their own coordinates; more tasks, lengths or methods may be added later."""
    return run_on(options.model, directory, options.dtype) | {
        "version": VERSION,
        "haystack": options.haystack,
        "depths": options.num_depths,
        "samples": options.samples,
        "seed": options.seed,
        "costs": cost_name,
        "matched to": options.matched_method,
        "tables": {
            name: [[pattern_json.to_json(p) for p in row] for row in table.layers]
            for name, table in options.tables.items()
        },
    }
