"""Figures of tables and reports: patterns, scores and density of every head. Pure functions: no window, no file."""

import dataclasses
import textwrap

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mmi_jax.engine.reporting.report import PrefillReport
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.tables.pattern_table import HeadScores, PatternTable

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#994455", "#eecc66", "#004488")
"""Qualitative colours that colour-blind readers tell apart (Paul Tol, "bright" and "high contrast")."""

LEGEND_COLUMNS = 105
"""Characters of a line of a legend under the narrowest picture."""

MAX_LEGEND = 24
"""Distinct patterns that a legend names."""


def plot_patterns(table: PatternTable) -> Figure:
    """The pattern of each head of each layer: one cell per head, one colour per distinct pattern."""
    distinct = list(dict.fromkeys(sum(table.layers, ())))
    numbers = np.array([[distinct.index(pattern) for pattern in heads] for heads in table.layers])
    colors = _colors(len(distinct))
    labels = [_label(pattern) for pattern in distinct[:MAX_LEGEND]]
    if len(distinct) > MAX_LEGEND:
        labels[-1] = f"and {len(distinct) - MAX_LEGEND + 1} more"
    num_lines = sum(1 + label.count("\n") for label in labels)
    figure = _figure(max(6.5, 1 + 0.3 * table.num_heads), 1.2 + 0.3 * table.num_layers + 0.18 * num_lines)
    axes = figure.add_subplot()
    axes.pcolormesh(
        numbers, cmap=ListedColormap(colors), vmin=-0.5, vmax=len(distinct) - 0.5, edgecolors="white", linewidth=1.5
    )
    axes.set(xlabel="query head", ylabel="layer", title="pattern of each head", aspect="equal")
    axes.invert_yaxis()
    _number_cells(axes, table.num_heads, table.num_layers)
    handles = [Patch(color=color, label=label) for color, label in zip(colors, labels, strict=False)]
    figure.legend(handles=handles, loc="outside lower left", fontsize=7, frameon=False)
    return figure


def plot_scores(scores: HeadScores) -> Figure:
    """Error and cost of each head side by side; cost as a fraction of a dense head's."""
    error, cost = np.array(scores.error), np.array(scores.cost) / scores.dense_cost
    figure = _figure(max(8.0, 1.5 + 0.5 * error.shape[1]), 1.2 + 0.25 * error.shape[0])
    for axes, values, title in zip(
        figure.subplots(1, 2), (error, cost), ("relative squared error", "cost / dense"), strict=True
    ):
        drawn = axes.pcolormesh(values, cmap="viridis", vmin=0, edgecolors="white", linewidth=0.5)
        axes.set(xlabel="query head", ylabel="layer", title=title)
        axes.invert_yaxis()
        _number_cells(axes, error.shape[1], error.shape[0])
        figure.colorbar(drawn, ax=axes)
    return figure


def plot_density(report: PrefillReport) -> Figure:
    """Density and estimated recall of each layer: the mean over heads as a line, their range as a band."""
    figure = _figure(6.4, 3.6)
    axes = figure.add_subplot()
    layers = np.arange(report.density.shape[0])
    for values, name, color in ((report.density, "density", COLORS[0]), (report.recall, "estimated recall", COLORS[2])):
        if np.isnan(values).all():
            continue
        axes.fill_between(layers, np.nanmin(values, axis=1), np.nanmax(values, axis=1), color=color, alpha=0.2, lw=0)
        axes.plot(layers, np.nanmean(values, axis=1), color=color, marker="o", markersize=3, label=name)
    axes.set(xlabel="layer", ylabel="fraction of dense attention", ylim=(0, None), title="mean and range over heads")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; `Figure` draws through Agg, whatever backend the user has."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _colors(number: int) -> list:
    """As many different colours; easy to tell apart while they are few."""
    return list(COLORS[:number] if number <= len(COLORS) else colormaps["turbo"](np.linspace(0, 1, number)))


def _number_cells(axes: Axes, num_columns: int, num_rows: int) -> None:
    for axis, count in ((axes.xaxis, num_columns), (axes.yaxis, num_rows)):
        numbers = np.arange(0, count, max(1, count // 16))
        axis.set_ticks(numbers + 0.5, labels=[str(n) for n in numbers])
        axis.set_tick_params(length=0, labelsize=7)


def _label(pattern: Pattern) -> str:
    """The pattern with the fields that differ from their defaults, on as many lines as it needs."""
    fields = [field for field in dataclasses.fields(pattern) if getattr(pattern, field.name) != field.default]  # pyright: ignore[reportArgumentType]
    text = f"{type(pattern).__name__}({', '.join(f'{f.name}={getattr(pattern, f.name)!r}' for f in fields)})"
    return textwrap.fill(text, LEGEND_COLUMNS)
