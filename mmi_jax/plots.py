"""Pictures as matplotlib figures; pure functions, no window, no file."""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mmi_jax.mask_plot import plot_mask as plot_mask
from mmi_jax.report import PrefillReport
from mmi_jax.table import PatternTable

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#994455", "#eecc66", "#004488")
"""Qualitative colours that colour-blind readers tell apart (Paul Tol, "bright" and "high contrast")."""


def plot_patterns(table: PatternTable) -> Figure:
    """Which pattern each head of each layer has: one cell per head, one colour per distinct pattern."""
    distinct = list(dict.fromkeys(sum(table.layers, ())))
    numbers = np.array([[distinct.index(pattern) for pattern in heads] for heads in table.layers])
    colors = [COLORS[n % len(COLORS)] for n in range(len(distinct))]
    figure = _figure(2.5 + 0.3 * table.num_heads, 1.6 + 0.3 * table.num_layers + 0.25 * len(distinct))
    axes = figure.add_subplot()
    axes.pcolormesh(
        numbers, cmap=ListedColormap(colors), vmin=-0.5, vmax=len(distinct) - 0.5, edgecolors="white", linewidth=1.5
    )
    axes.set(xlabel="query head", ylabel="layer", title="pattern of each head", aspect="equal")
    axes.invert_yaxis()
    _number_cells(axes, table.num_heads, table.num_layers)
    handles = [Patch(color=color, label=_label(pattern)) for color, pattern in zip(colors, distinct, strict=True)]
    figure.legend(handles=handles, loc="outside lower left", fontsize=7, frameon=False)
    return figure


def plot_density(report: PrefillReport) -> Figure:
    """Density and estimated recall of each layer: the mean over heads as a line, least to most as a band."""
    figure = _figure(6.4, 3.6)
    axes = figure.add_subplot()
    layers = np.arange(report.density.shape[0])
    for values, name, color in ((report.density, "density", COLORS[0]), (report.recall, "estimated recall", COLORS[2])):
        if np.isnan(values).all():
            continue
        axes.fill_between(layers, np.nanmin(values, axis=1), np.nanmax(values, axis=1), color=color, alpha=0.2, lw=0)
        axes.plot(layers, np.nanmean(values, axis=1), color=color, marker="o", markersize=3, label=name)
    axes.set(xlabel="layer", ylabel="share of dense attention", ylim=(0, None), title="mean and range over heads")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; `Figure` draws through Agg, whatever backend the user has."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _number_cells(axes, num_columns: int, num_rows: int) -> None:
    for axis, count in ((axes.xaxis, num_columns), (axes.yaxis, num_rows)):
        numbers = np.arange(0, count, max(1, count // 16))
        axis.set_ticks(numbers + 0.5, labels=[str(n) for n in numbers])
        axis.set_tick_params(length=0, labelsize=7)


def _label(pattern) -> str:
    """The pattern with its fields, cut where it would leave the picture."""
    text = str(pattern)
    return text if len(text) <= 110 else text[:107] + "..."
