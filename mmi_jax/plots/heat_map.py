"""Heat maps of accuracy by length and depth, one for each method, as needle-in-a-haystack results are shown."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

COLUMNS = 3
"""Heat maps in a line."""


def plot_heat_maps(
    accuracy: Mapping[str, Float[np.ndarray, "depths lengths"]],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    title: str,
) -> Figure:
    """One heat map per method: length of the prompt to the right, depth of the needle downwards; NaN where not run.

    Args:
      accuracy: by the text above each heat map; between 0 and 1.
      lengths: of the prompts; tokens.
      depths: of the needle, as fractions of the prompt.
    """
    columns = min(COLUMNS, len(accuracy))
    rows = -(-len(accuracy) // columns)
    size = (1.2 + columns * (1.2 + 0.5 * len(lengths)), 0.9 + rows * (1.1 + 0.28 * len(depths)))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    drawn = None
    for axes, (name, values) in zip(grid.flat, accuracy.items(), strict=False):
        drawn = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axes.set_title(name, fontsize=8)
        axes.set_xticks(range(len(lengths)), [_short(n) for n in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                cell = drawn.cmap(drawn.norm(value))
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=readable_on(cell))
    for axes in grid.flat[len(accuracy) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("tokens", fontsize=8)
    figure.supylabel("depth", fontsize=8)
    if drawn is not None:
        figure.colorbar(drawn, ax=grid, shrink=0.7, label="accuracy")
    return figure


def readable_on(color: Sequence[float]) -> str:
    """Black or white, whichever has the higher contrast on an sRGB color (WCAG 2.1, contrast ratio)."""
    red, green, blue = ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in color[:3])
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "black" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "white"


def _short(num_tokens: int) -> str:
    return f"{num_tokens // 1024}K" if num_tokens >= 1024 and num_tokens % 1024 == 0 else f"{num_tokens:,}"
