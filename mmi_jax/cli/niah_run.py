"""What `mmi niah` does: sizes of the methods, cells of the grid one by one, and what is written of them."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mmi_jax import Blocks, PatternTable, codec, console
from mmi_jax.cli.answers import answer
from mmi_jax.cli.digest import weights_digest
from mmi_jax.cli.niah_results import write_results
from mmi_jax.cli.niah_task import DENSE, NiahTask
from mmi_jax.cli.samples import SampleSource, haystack_of
from mmi_jax.cost import CostModel
from mmi_jax.patterns import Pattern
from mmi_jax.search.capture import Captured, captured_layers
from mmi_jax.search.costs import cost_models, default_costs
from mmi_jax.search.equal_cost import member_of_cost
from mmi_jax.search.families import FAMILIES, published
from mmi_jax.search.journal import Journal
from models.hub import locate
from models.qwen2_5_vl.processor import Processor
from models.qwen2_5_vl.weights import load
from models.tasks import Sample

LAYERS_LOOKED_AT = 2
"""First layers on whose queries and keys a baseline's size is chosen; what it cost is counted in all of them."""

QUESTIONS = 4
"""Questions of a sample at most; each prefill has room for so many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
    """A model, the samples for it, and the journal of what is done."""

    task: NiahTask
    model: Any
    processor: Processor
    source: SampleSource
    costs: CostModel
    journal: Journal

    def samples(self, name: str, tokens: int, depth_number: int) -> list[Sample]:
        """The samples of one cell, the same for every method."""
        first = self.task.seed + depth_number * self.task.samples
        depth = self.task.depths[depth_number]
        numbers = range(first, first + self.task.samples)
        return [self.source.sample(name, num_tokens=tokens, depth=depth, seed=n) for n in numbers]

    def ask(self, samples: Sequence[Sample], table: PatternTable | Pattern | None) -> dict[str, Any]:
        """The figures of some samples under one method."""
        most = max(QUESTIONS, *(len(sample.questions) for sample in samples))
        found = answer(
            self.model, self.processor, samples, table, costs=self.costs, batch=self.task.batch, num_rows=most
        )
        return dataclasses.asdict(found)

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The journal's row with these values."""
        return next((dict(row) for row in self.journal.rows if all(row.get(k) == v for k, v in wanted.items())), None)

    def method(self, name: str, task: str, tokens: int) -> PatternTable | Pattern | None:
        """What a method runs on the prompts of a task and length; a baseline's size is chosen once and kept."""
        if name == DENSE or name in self.task.tables:
            return self.task.tables.get(name)
        row = self.find(kind="size", task=task, tokens=tokens, method=name)
        if row is None:
            row = {"kind": "size", "task": task, "tokens": tokens, "method": name}
            self.journal.add(row | {"pattern": codec.to_json(self._sized(name, task, tokens))})
            row = self.find(**row)
            assert row is not None
        return codec.from_json(row["pattern"])

    def _sized(self, name: str, task: str, tokens: int) -> Pattern:
        """The member of a family that costs what the method to be matched costs; the published one without such."""
        sample = self.samples(task, tokens, len(self.task.depths) // 2)[0]
        if self.task.match_to is None:
            return published(name, self.source.measure.grid)
        cost = self.ask([sample], self.method(self.task.match_to, task, tokens))
        layers = self._captured(sample)
        ladder = FAMILIES[name].ladder(round(cost["prompt_tokens"]))
        return member_of_cost(ladder, cost["cost"] / cost["dense_cost"], layers, self.costs, Blocks())[0]

    def _captured(self, sample: Sample) -> list[Captured]:
        number = min(LAYERS_LOOKED_AT, self.model.config.num_layers)
        prompt = self.processor(list(sample.parts))
        return list(captured_layers(self.model, prompt, blocks=Blocks(), num_layers=number))


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
    """Every cell, in the order of task, length, depth, method."""
    task, cells = runner.task, []
    places = list(itertools.product(task.tasks, task.tokens, range(len(task.depths))))
    total = len(places) * len(task.methods)
    for name, tokens, number in places:
        samples: list[Sample] = []
        for method in task.methods:
            on_cell(len(cells), total, f"{method}: {name}, {tokens} tokens, depth {task.depths[number]:.2f}")
            key = {"kind": "cell", "task": name, "tokens": tokens, "depth": task.depths[number], "method": method}
            cell = runner.find(**key)
            if cell is None:
                samples = samples or runner.samples(name, tokens, number)
                table = runner.method(method, name, tokens)
                cell = key | runner.ask(samples, table) | {"pattern": _named(table)}
                runner.journal.add(cell)
            cells.append(cell)
    on_cell(total, total, "done")
    return cells


def _named(table: PatternTable | Pattern | None) -> str:
    """A method's pattern as text."""
    if table is None:
        return "Dense()"
    return "a table" if isinstance(table, PatternTable) else repr(table)


def _run_of(task: NiahTask, directory: Path, cost_name: str) -> dict[str, Any]:
    """What the cells depend on besides their own coordinates; more tasks, lengths or methods may be added later."""
    device = jax.devices()[0]
    return {
        "model": Path(task.model).name,
        "weights": weights_digest(directory),
        "haystack": task.haystack,
        "depths": task.num_depths,
        "samples": task.samples,
        "seed": task.seed,
        "dtype": task.dtype,
        "costs": cost_name,
        "device": f"{device.platform} {device.device_kind}",
        "matched to": task.match_to,
        "tables": {
            name: [[codec.to_json(p) for p in row] for row in table.layers] for name, table in task.tables.items()
        },
    }
