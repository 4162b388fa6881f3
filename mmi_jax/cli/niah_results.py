"""What is written of a filled grid: CSV, JSON, a heat map per task, and the means on the terminal."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from mmi_jax import console
from mmi_jax.bench.machine import machine
from mmi_jax.cli.niah_task import NiahTask
from mmi_jax.cli.pictures import write_figure
from mmi_jax.heat_map import plot_heat_maps
from pallas_kernels.attention.gpu_tuned import write_whole

type Cell = Mapping[str, Any]

COLUMNS = ("task", "method", "tokens", "depth", "correct", "asked", "accuracy", "density", "cost share", "pattern")


def write_results(task: NiahTask, run: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    """Writes results.csv, results.json and one PNG per task, and prints a table per task."""
    out = console.stdout_console()
    provenance = {name: value for name, value in run.items() if name != "tables"} | machine()
    write_whole(task.output / "results.csv", csv_text(cells))
    written = {"run": provenance, "cells": list(map(dict, cells))}
    write_whole(task.output / "results.json", json.dumps(written, indent=1))
    for name in task.tasks:
        of_task = [cell for cell in cells if cell["task"] == name]
        accuracy = {
            f"{method}, cost {mean_share(of_task, method):.1%}": grid(of_task, method, task) for method in task.methods
        }
        figure = plot_heat_maps(accuracy, lengths=task.tokens, depths=task.depths, title=name)
        write_figure(task.output / f"{name}.png", figure)
        out.print(means_table(name, of_task, task))
    print(f"wrote results.csv, results.json and {len(task.tasks)} heat maps into {task.output}")


def csv_text(cells: Sequence[Cell]) -> str:
    """One line per cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in cells:
        figures = cell["correct"], cell["asked"], accuracy_of([cell]), cell["density"], share_of(cell)
        rounded = [round(x, 5) if isinstance(x, float) else x for x in figures]
        writer.writerow([cell["task"], cell["method"], cell["tokens"], cell["depth"], *rounded, cell["pattern"]])
    return text.getvalue()


def grid(cells: Sequence[Cell], method: str, task: NiahTask) -> np.ndarray:
    """Accuracy of one method, `[depths, lengths]`."""
    found = {(c["depth"], c["tokens"]): accuracy_of([c]) for c in cells if c["method"] == method}
    return np.array([[found.get((depth, n), np.nan) for n in task.tokens] for depth in task.depths])


def accuracy_of(cells: Sequence[Cell]) -> float:
    """Share of questions answered right."""
    return sum(cell["correct"] for cell in cells) / sum(cell["asked"] for cell in cells)


def share_of(cell: Cell) -> float:
    """Attention cost over that of dense attention."""
    return cell["cost"] / cell["dense_cost"]


def mean_share(cells: Sequence[Cell], method: str) -> float:
    """The same, mean over a method's cells."""
    return float(np.mean([share_of(cell) for cell in cells if cell["method"] == method]))


def means_table(name: str, cells: Sequence[Cell], task: NiahTask) -> Table:
    """Accuracy of each method by length and over all; its cost, marked where it is not that of the matched method."""
    table = Table("method", *(f"{n}" for n in task.tokens), "all", "cost", "density", title=name, title_justify="left")
    target = None if task.match_to not in task.methods else mean_share(cells, str(task.match_to))
    for method in task.methods:
        own = [cell for cell in cells if cell["method"] == method]
        by_length = [[c for c in own if c["tokens"] == n] for n in task.tokens]
        share = mean_share(own, method)
        is_off = target is not None and method not in ("dense", *task.tables) and abs(share / target - 1) > task.margin
        table.add_row(
            method,
            *(f"{accuracy_of(group):.1%}" for group in by_length),
            f"{accuracy_of(own):.1%}",
            f"{share:.1%}{' (not equal)' if is_off else ''}",
            f"{np.mean([cell['density'] for cell in own]):.1%}",
        )
    return table
