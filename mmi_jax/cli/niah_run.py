"""What `mmi niah` does: sizes of the methods, cells of the grid one by one, and what is written of them."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mmi_jax import Blocks, PatternTable, codec, console
from mmi_jax.buckets import Buckets
from mmi_jax.cli.answers import Asked, answer, ask_in_batches
from mmi_jax.cli.digest import run_on
from mmi_jax.cli.niah_results import write_results
from mmi_jax.cli.niah_task import NiahTask
from mmi_jax.cli.samples import SampleSource, haystack_of
from mmi_jax.cost import CostModel
from mmi_jax.patterns import Pattern
from mmi_jax.search.capture import captured_layers, num_tokens_of
from mmi_jax.search.costs import cost_models, default_costs
from mmi_jax.search.equal_cost import member_of_cost
from mmi_jax.search.families import FAMILIES, published
from mmi_jax.search.journal import Journal
from models.hub import locate
from models.qwen2_5_vl.processor import Processor
from models.qwen2_5_vl.weights import load

LAYERS_LOOKED_AT = 2
"""First layers on whose queries and keys a baseline's size is chosen; what it cost is counted in all of them."""

QUESTIONS = 4
"""Questions of a sample at most; each prefill has room for so many."""

VERSION = 2
"""Of what the tasks' samples show and of how sizes are chosen: cells of another are refused."""

SAMPLES_AHEAD = 2
"""Cells whose samples are being made while another's are asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
    """A model, the samples for it, and the journal of what is done."""

    task: NiahTask
    model: Any
    processor: Processor
    source: SampleSource
    costs: CostModel
    journal: Journal

    def batches(self, name: str, tokens: int, depth_number: int) -> list[Asked]:
        """The samples of one cell, the same for every method."""
        first = self.task.seed + depth_number * self.task.samples
        depth = self.task.depths[depth_number]
        numbers = range(first, first + self.task.samples)
        samples = [self.source.sample(name, num_tokens=tokens, depth=depth, seed=n) for n in numbers]
        return ask_in_batches(self.processor, samples, batch=self.task.batch, num_rows=QUESTIONS)

    def ask(self, batches: Sequence[Asked], table: PatternTable | Pattern | None) -> dict[str, Any]:
        """The figures of some samples under one method."""
        return dataclasses.asdict(answer(self.model, batches, table, self.costs))

    def rows(self, **wanted: Any) -> Iterator[dict[str, Any]]:
        """The journal's rows with these values."""
        return (dict(row) for row in self.journal.rows if all(row.get(k) == v for k, v in wanted.items()))

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The first of them."""
        return next(self.rows(**wanted), None)

    def methods(
        self, names: Sequence[str], tokens: int, batches: Sequence[Asked]
    ) -> dict[str, PatternTable | Pattern | None]:
        """What the methods run on these samples; a baseline keeps its size where the matched method costs alike."""
        baselines = [name for name in names if name in FAMILIES and name not in self.task.tables]
        share = self._share_to_match(batches[0]) if baselines else None
        kept = {name: self._kept(name, tokens, share) for name in baselines}
        missing = [name for name, pattern in kept.items() if pattern is None]
        for name, pattern in zip(missing, self._sized(missing, share, batches[0]), strict=True):
            row = {"kind": "size", "tokens": tokens, "method": name, "share": share}
            self.journal.add(row | {"pattern": codec.to_json(pattern)})
            kept[name] = pattern
        return {name: kept[name] if name in kept else self.task.tables.get(name) for name in names}

    def _share_to_match(self, batch: Asked) -> float | None:
        """What the method to be matched costs on these prompts, of dense attention; None without such a method."""
        if self.task.match_to is None:
            return None
        cost = self.ask([batch], self.task.tables.get(self.task.match_to))
        return cost["cost"] / cost["dense_cost"]

    def _kept(self, name: str, tokens: int, share: float | None) -> Pattern | None:
        """The size that the journal has of a baseline for a length and about this cost."""
        for row in self.rows(kind="size", tokens=tokens, method=name):
            if share is None or abs(row["share"] / share - 1) <= self.task.margin:
                return codec.from_json(row["pattern"])
        return None

    def _sized(self, names: Sequence[str], share: float | None, batch: Asked) -> list[Pattern]:
        """The members of families that cost this share of dense attention; the published ones where there is none."""
        if not names:
            return []
        if share is None:
            return [published(name, self.source.measure.grid) for name in names]
        number = min(LAYERS_LOOKED_AT, self.model.config.num_layers)
        prompt = self.processor(list(batch.samples[0].parts), cuts_on_device=True)
        layers = list(captured_layers(self.model, prompt, blocks=Blocks(), num_layers=number))

        def member(name: str) -> Pattern:
            ladder = FAMILIES[name].ladder(num_tokens_of(prompt))
            return member_of_cost(ladder, share, layers, self.costs, Blocks())[0]

        with ThreadPoolExecutor(max_workers=self.task.side_by_side) as pool:
            return list(pool.map(member, names))

    def warm(self, tables: Sequence[PatternTable | Pattern | None], batches: Sequence[Asked]) -> None:
        """Compiles the programs of several methods side by side, which takes the memory of as many prefills."""
        with ThreadPoolExecutor(max_workers=self.task.side_by_side) as pool:
            list(pool.map(lambda table: self.ask(batches[:1], table), tables))


def run_niah(task: NiahTask) -> list[dict[str, Any]]:
    """Fills the grid, writes CSV, JSON and heat maps into the output directory, and prints the means.

    Raises:
      ValueError: the model, haystack or journal cannot be used, or the prompts are too short for a task.
    """
    directory = locate(task.model)
    processor = Processor.from_directory(directory)
    source = SampleSource(processor=processor, haystack=haystack_of(task.haystack))
    for name, tokens in itertools.product(task.tasks, task.tokens):  # refused now rather than after an hour
        source.sample(name, num_tokens=tokens, depth=0.5, seed=task.seed)
    cost_name = task.costs or default_costs()
    task.output.mkdir(parents=True, exist_ok=True)
    run = _run_of(task, directory, cost_name)
    journal = Journal(task.output / "cells.jsonl", run)
    with console.progress_bar("loading weights", "tensors") as on_tensor:
        model = load(directory, dtype=jnp.dtype(task.dtype), on_tensor=on_tensor)
    for table in task.tables.values():
        table.check_fits(num_layers=model.config.num_layers, num_heads=model.config.num_heads)
    runner = Runner(
        task=task, model=model, processor=processor, source=source, costs=cost_models()[cost_name], journal=journal
    )
    with console.work_bar("cells") as on_cell:
        cells = _fill(runner, on_cell)
    write_results(task, run, cells)
    return cells


def _fill(runner: Runner, on_cell) -> list[dict[str, Any]]:
    """Every cell, in the order of task, length, depth, method; the next samples are made while these are asked."""
    task, cells = runner.task, []
    places = list(itertools.product(task.tasks, task.tokens, range(len(task.depths))))
    total, warmed = len(places) * len(task.methods), set()
    missing = {place: [m for m in task.methods if not runner.find(**_key(task, place, m))] for place in places}
    with ThreadPoolExecutor(max_workers=SAMPLES_AHEAD) as pool:
        unfilled = [place for place in places if missing[place]]
        coming = {place: pool.submit(runner.batches, *place) for place in unfilled[:SAMPLES_AHEAD]}
        for place in places:
            name, tokens, number = place
            what = f"{name}, {tokens} tokens, depth {task.depths[number]:.2f}"
            on_cell(len(cells), total, f"samples: {what}")
            batches = coming.pop(place).result() if missing[place] else []
            if waiting := [p for p in unfilled[unfilled.index(place) + 1 :] if p not in coming] if batches else []:
                coming[waiting[0]] = pool.submit(runner.batches, *waiting[0])
            tables = runner.methods(missing[place], tokens, batches) if batches else {}
            programs = {method: (method, _named(table), _bucket(batches)) for method, table in tables.items()}
            cold = [method for method, program in programs.items() if program not in warmed]
            if cold and task.side_by_side > 1:
                on_cell(len(cells), total, f"compiling: {what}")
                runner.warm([tables[method] for method in cold], batches)
                warmed.update(programs.values())
            for method in task.methods:
                on_cell(len(cells), total, f"{method}: {what}")
                key = _key(task, place, method)
                cell = runner.find(**key)
                if cell is None:
                    cell = key | runner.ask(batches, tables[method]) | {"pattern": _named(tables[method])}
                    runner.journal.add(cell)
                cells.append(cell)
    on_cell(total, total, "done")
    return cells


def _bucket(batches: Sequence[Asked]) -> int:
    """Tokens that the first batch is padded to."""
    return Buckets().length_for(batches[0].prompt.tokens.shape[1])


def _key(task: NiahTask, place: tuple[str, int, int], method: str) -> dict[str, Any]:
    """What names a cell of one method."""
    name, tokens, number = place
    return {"kind": "cell", "task": name, "tokens": tokens, "depth": task.depths[number], "method": method}


def _named(table: PatternTable | Pattern | None) -> str:
    """A method's pattern as text."""
    if table is None:
        return "Dense()"
    return "a table" if isinstance(table, PatternTable) else repr(table)


def _run_of(task: NiahTask, directory: Path, cost_name: str) -> dict[str, Any]:
    """What the cells depend on besides their own coordinates; more tasks, lengths or methods may be added later."""
    return run_on(task.model, directory, task.dtype) | {
        "version": VERSION,
        "haystack": task.haystack,
        "depths": task.num_depths,
        "samples": task.samples,
        "seed": task.seed,
        "costs": cost_name,
        "matched to": task.match_to,
        "tables": {
            name: [[codec.to_json(p) for p in row] for row in table.layers] for name, table in task.tables.items()
        },
    }
