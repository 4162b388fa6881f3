"""Results of a filled grid: CSV, JSON, a heat map per task, and the means on the terminal."""

import csv
import dataclasses
import io
import json
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from mmi_jax.bench.timing.machine import machine
from mmi_jax.cli import console
from mmi_jax.cli.niah.journal_entries import Cell, matched_fractions, read_cells
from mmi_jax.cli.niah.options import DENSE, NiahOptions
from mmi_jax.cli.pictures import write_figure
from mmi_jax.files import write_whole
from mmi_jax.plots.heat_map import plot_heat_maps
from mmi_jax.search.trials.journal import Journal

COLUMNS = (
    "task",
    "method",
    "tokens",
    "depth",
    "correct",
    "questions",
    "accuracy",
    "density",
    "cost fraction",
    "pattern",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The contents of a run's journal.

    Args:
      cells: by task as first evaluated, tokens, depth, and method as first named.
      methods: in the order first named.
      depths: of the needle.
      matched_costs: cost of the matched method over that of dense attention, by task and tokens; empty without one.
      unsized: methods that are not brought to a cost.
      tolerance: relative difference from the matched cost above which a method is marked.
    """

    cells: Sequence[Cell]
    methods: Sequence[str]
    depths: Sequence[float]
    matched_costs: Mapping[tuple[str, int], float]
    unsized: Collection[str]
    tolerance: float

    def is_off(self, method: str, cells: Sequence[Cell]) -> bool:
        """Whether a method costs something else than the matched one on some task and length of these cells."""
        if method in self.unsized:
            return False
        places = {(cell["task"], cell["tokens"]) for cell in cells} & set(self.matched_costs)
        costs = {place: mean_cost([c for c in cells if (c["task"], c["tokens"]) == place], method) for place in places}
        return any(abs(cost / self.matched_costs[place] - 1) > self.tolerance for place, cost in costs.items())


def remember_methods(journal: Journal, methods: Sequence[str]) -> None:
    """Puts methods in the journal that it does not name yet, after those that it names."""
    named = _named_methods(journal)
    if not set(methods) <= set(named):
        journal.add({"kind": "methods", "names": list(dict.fromkeys((*named, *methods)))})


def _named_methods(journal: Journal) -> list[str]:
    """In the order first named."""
    rows = journal.matching(kind="methods")
    return list(rows[-1]["names"]) if rows else []


def results_of(options: NiahOptions, journal: Journal) -> Results:
    """All that the journal holds, of whichever methods, tasks and lengths it was filled with."""
    cells, methods = read_cells(journal), _named_methods(journal)
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    cells.sort(key=lambda c: (tasks.index(c["task"]), c["tokens"], c["depth"], methods.index(c["method"])))
    costs = matched_fractions(journal)
    for place in {(cell["task"], cell["tokens"]) for cell in cells if cell["method"] == options.matched_method}:
        costs[place] = mean_cost([c for c in cells if (c["task"], c["tokens"]) == place], str(options.matched_method))
    return Results(
        cells=cells,
        methods=[method for method in methods if any(c["method"] == method for c in cells)],
        depths=options.depths,
        matched_costs=costs,
        unsized=(DENSE, *options.tables),
        tolerance=options.cost_tolerance,
    )


def write_results(options: NiahOptions, journal: Journal) -> None:
    """Writes results.csv, results.json and one PNG per task of all that the journal holds; prints a table per task."""
    out, results = console.stdout_console(), results_of(options, journal)
    provenance = {name: value for name, value in journal.run.items() if name != "tables"} | machine()
    write_whole(options.output / "results.csv", csv_text(results.cells))
    written = {"run": provenance, "cells": list(map(dict, results.cells))}
    write_whole(options.output / "results.json", json.dumps(written, indent=1))
    names = list(dict.fromkeys(cell["task"] for cell in results.cells))
    for name in names:
        of_task = dataclasses.replace(results, cells=[cell for cell in results.cells if cell["task"] == name])
        write_figure(options.output / f"{name}.png", heat_maps(name, of_task))
        out.print(means_table(name, of_task))
    print(f"wrote results.csv, results.json and {len(names)} heat maps into {options.output}")


def heat_maps(name: str, results: Results) -> Figure:
    """A heat map of each method of one task."""
    cells, lengths = results.cells, lengths_of(results.cells)
    accuracy = {
        f"{method}, cost {mean_cost(cells, method):.1%}": grid(cells, method, results.depths, lengths)
        for method in results.methods
        if any(cell["method"] == method for cell in cells)
    }
    return plot_heat_maps(accuracy, lengths=lengths, depths=results.depths, title=name)


def lengths_of(cells: Sequence[Cell]) -> list[int]:
    """Lengths of the prompts, ascending; tokens."""
    return sorted({cell["tokens"] for cell in cells})


def csv_text(cells: Sequence[Cell]) -> str:
    """One line per cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in cells:
        figures = cell["correct"], cell["questions"], accuracy_of([cell]), cell["density"], cost_of(cell)
        rounded = [round(x, 5) if isinstance(x, float) else x for x in figures]
        writer.writerow([cell["task"], cell["method"], cell["tokens"], cell["depth"], *rounded, cell["pattern"]])
    return text.getvalue()


def grid(cells: Sequence[Cell], method: str, depths: Sequence[float], lengths: Sequence[int]) -> np.ndarray:
    """Accuracy of one method, `[depths, lengths]`; NaN where there is none."""
    accuracies = {(c["depth"], c["tokens"]): accuracy_of([c]) for c in cells if c["method"] == method}
    return np.array([[accuracies.get((depth, n), np.nan) for n in lengths] for depth in depths])


def accuracy_of(cells: Sequence[Cell]) -> float:
    """Fraction of questions answered right."""
    return sum(cell["correct"] for cell in cells) / sum(cell["questions"] for cell in cells)


def cost_of(cell: Cell) -> float:
    """Attention cost over that of dense attention."""
    return cell["cost"] / cell["dense_cost"]


def mean_cost(cells: Sequence[Cell], method: str) -> float:
    """The same, mean over a method's cells."""
    return float(np.mean([cost_of(cell) for cell in cells if cell["method"] == method]))


def means_table(name: str, results: Results) -> Table:
    """Accuracy of each method by length and over all; its cost, marked where it is not that of the matched method."""
    lengths = lengths_of(results.cells)
    table = Table("method", *(f"{n}" for n in lengths), "all", "cost", "density", title=name, title_justify="left")
    for method in results.methods:
        rows = [cell for cell in results.cells if cell["method"] == method]
        if not rows:
            continue
        by_length = [[c for c in rows if c["tokens"] == n] for n in lengths]
        table.add_row(
            method,
            *(f"{accuracy_of(group):.1%}" if group else "" for group in by_length),
            f"{accuracy_of(rows):.1%}",
            f"{mean_cost(rows, method):.1%}{' (not equal)' if results.is_off(method, rows) else ''}",
            f"{np.mean([cell['density'] for cell in rows]):.1%}",
        )
    return table
