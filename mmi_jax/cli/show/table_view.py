"""A pattern table on the terminal: layers x heads by pattern, error, cost, and the fraction of the time."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmi_jax import PatternTable
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.tables.pattern_table import HeadScores

COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta", "bright_green")

HEAT = ("dim", "white", "yellow", "bright_red")
"""Styles of numbers from small to large."""


def print_table(table: PatternTable, out: Console) -> None:
    """Everything the table says, the provenance last."""
    marks = marks_of(table)
    out.print(heads_grid(table, marks), soft_wrap=True)
    out.print(patterns_table(table, marks), soft_wrap=True)
    if table.scores is not None:
        out.print(numbers_grid("error of each head, per mille", table.scores.error, 1000, (1, 10, 100)), soft_wrap=True)
        if table.scores.weight is not None:
            title = "weight of each head's error, per cent"
            out.print(numbers_grid(title, table.scores.weight, 100, (75, 150, 300)), soft_wrap=True)
        cost = tuple(tuple(x / table.scores.dense_cost for x in row) for row in table.scores.cost)
        out.print(numbers_grid("cost of each head, per cent of a dense one", cost, 100, (10, 25, 60)), soft_wrap=True)
        out.print(layers_table(table.scores), soft_wrap=True)
    out.print(f"model: {table.model or 'unnamed'}", markup=False)
    for name, value in table.provenance.items():
        out.print(f"{name}: {value}", markup=False, soft_wrap=True)


def heads_grid(table: PatternTable, marks: Mapping[Pattern, Text]) -> Text:
    """One line per layer, one mark per head."""
    return _lines(table.num_layers, lambda n: (marks[p] for p in table.layers[n]))


def patterns_table(table: PatternTable, marks: Mapping[Pattern, Text]) -> Table:
    """Mark, number of heads, fraction of the time and mean error where scores are, and the pattern with its fields."""
    heads = sum(table.layers, ())
    scores = table.scores
    grid = Table("mark", "heads", *(["time", "error"] if scores else []), "pattern")
    for pattern, mark in marks.items():
        figures = []
        if scores is not None:
            is_pattern = np.array([p == pattern for p in heads])
            cost, error = np.ravel(scores.cost), np.ravel(scores.error)
            figures = [f"{cost[is_pattern].sum() / cost.sum():.1%}", f"{error[is_pattern].mean():.4f}"]
        grid.add_row(mark, str(heads.count(pattern)), *figures, Text(str(pattern), overflow="fold"))
    return grid


def numbers_grid(title: str, values: tuple[tuple[float, ...], ...], factor: int, limits: tuple[int, ...]) -> Text:
    """One line per layer, one whole number per head, in the style of the limits it reaches."""

    def cell(value: float) -> Text:
        number = round(value * factor)
        return Text(f"{number:>4}", style=HEAT[sum(number >= limit for limit in limits)])

    return Text(f"{title}\n", style="bold").append_text(
        _lines(len(values), lambda n: map(cell, values[n]), style="none")
    )


def layers_table(scores: HeadScores) -> Table:
    """Mean error, density and fraction of the time of each layer, and of all."""
    cost, error, density = (np.array(x) for x in (scores.cost, scores.error, scores.density))
    grid = Table("layer", "error", "density", "cost of dense", "fraction of time")
    rows = [(str(n), n) for n in range(len(cost))] + [("all", slice(None))]
    for name, n in rows:
        grid.add_row(
            name,
            f"{error[n].mean():.4f}",
            f"{density[n].mean():.1%}",
            f"{cost[n].mean() / scores.dense_cost:.1%}",
            f"{cost[n].sum() / cost.sum():.1%}",
        )
    return grid


def marks_of(table: PatternTable) -> dict[Pattern, Text]:
    """A coloured letter and number for each distinct pattern: `G1` is the first Grid."""
    marks: dict[Pattern, Text] = {}
    for n, pattern in enumerate(dict.fromkeys(sum(table.layers, ()))):
        name = type(pattern).__name__
        number = 1 + sum(type(other) is type(pattern) for other in marks)
        marks[pattern] = Text(f"{_short(name)}{number}", style=COLORS[n % len(COLORS)])
    return marks


def _lines(num_layers: int, cells: Callable[[int], Iterator[Text]], style: str = "") -> Text:
    width = len(str(num_layers - 1))
    lines = [Text(f"layer {n:>{width}}  ", style=style) + Text(" ").join(cells(n)) for n in range(num_layers)]
    return Text("\n").join(lines)


def _short(name: str) -> str:
    """The capitals of a pattern's name: VerticalSlash is VS."""
    return "".join(letter for letter in name if letter.isupper())
