"""Pictures of a prefill: patterns, density and masks as files."""

from pathlib import Path

import jax
from matplotlib.figure import Figure

from mmi_jax import Blocks
from mmi_jax.engine.reporting.report import PrefillReport
from mmi_jax.files import new_file
from mmi_jax.plots import table_plots
from mmi_jax.plots.head_plans import plan_of_heads
from mmi_jax.plots.mask_plot import plot_mask
from models.prompt import Prompt

MAX_MASKS = 6
"""Distinct patterns of a layer of which a mask is drawn, at most."""


def write_pictures(
    directory: Path, model, prompt: Prompt, report: PrefillReport, *, layer: int, blocks: Blocks
) -> tuple[Path, ...]:
    """Writes the patterns by layer and head, the density by layer, and masks of one layer.

    Args:
      layer: whose masks are drawn: of the first head of each distinct pattern.

    Returns:
      The files written.
    """
    figures = {
        "patterns": table_plots.plot_patterns(report.table),
        "density": table_plots.plot_density(report),
        **_masks(model, prompt, report, layer, blocks),
    }
    directory.mkdir(parents=True, exist_ok=True)
    return tuple(write_figure(directory / f"{name}.png", figure) for name, figure in figures.items())


def _masks(model, prompt: Prompt, report: PrefillReport, layer: int, blocks: Blocks) -> dict[str, Figure]:
    """The masks by file name."""
    patterns = report.table.layers[layer]
    heads = [patterns.index(pattern) for pattern in dict.fromkeys(patterns)][:MAX_MASKS]
    plan = plan_of_heads(model, prompt, report.table, layer=layer, heads=heads, blocks=blocks)
    layout = jax.tree.map(lambda field: field[0], prompt.layout)
    figures = {}
    for n, head in enumerate(heads):
        name = type(patterns[head]).__name__
        title = f"layer {layer}, head {head}: {name}, density {report.density[layer, head]:.2f}"
        figures[f"mask-layer{layer}-head{head}"] = plot_mask(plan, n, layout, title=title)
    return figures


def write_figure(path: Path, figure: Figure) -> Path:
    """Writes a picture, whole or not at all."""
    with new_file(path) as temporary:
        figure.savefig(temporary)
    return path
