"""plot_mask: one head's attention before and after permutation, side by side."""

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mmi_jax.layout import TEXT, VISION, TokenLayout
from mmi_jax.method.plan import Plan
from mmi_jax.plots.mask_raster import GATHERED, KEYS, Raster, Segment, rasterize

KEYS_COLOR, REGROUPED_COLOR, GATHERED_COLOR = "#33658a", "#e4572e", "#2a9d8f"
QUERIES_COLOR, SKIPPED_COLOR, OUTSIDE_COLOR = "#555555", "#ececec", "#ffffff"
TEXT_COLOR, VISION_COLOR, OTHER_COLOR = "#9aa5b1", "#f2b134", "#b39ddb"
TINT = 0.28
"""Strength of the colour of pairs that are computed with a tile and then masked."""

WIDTH, TALLEST = 13.0, 9.0
"""Width of a picture, and height of the images in it, at most; inches."""

STRIP = 0.025
"""Width of the strips that say where text and video are; share of an image."""

SMALLEST_LABEL = 0.07
"""Share of an axis below which a span is drawn without its name."""


def plot_mask(plan: Plan, head: int, layout: TokenLayout, *, title: str | None = None) -> Figure:
    """What one head attends: on the left in prompt order, on the right the same pairs as the kernel computes them.

    A pair has the same colour on both sides: that of the keys through which it is computed.

    Args:
      plan: of one example, of a whole prompt.
      layout: of the prompt, fields [t].
      title: above the picture.
    """
    raster = rasterize(plan, head, gap=10)
    rows, columns = raster.images.kept.shape
    # Both images are equally high; 1.3 inches of width and 1.6 of height are left to names, title and legend.
    ratio = columns / rows
    height = min((WIDTH - 1.3) / (1 + ratio), TALLEST)
    figure = Figure(figsize=((1 + ratio) * height + 1.3, height + 1.6), dpi=130)
    grid = figure.add_gridspec(1, 2, width_ratios=(1, ratio), wspace=0.13)
    left, right = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    figure.subplots_adjust(left=0.055, right=0.995, top=1 - 0.75 / (height + 1.6), bottom=0.85 / (height + 1.6))
    _draw_before(left, raster, layout)
    _draw_after(right, raster)
    figure.suptitle(title or f"head {head}", fontsize=13, x=0.055, ha="left")
    figure.legend(handles=_legend(raster, plan, layout), loc="lower center", ncols=6, frameon=False, fontsize=9)
    return figure


def _draw_before(axes: Axes, raster: Raster, layout: TokenLayout) -> None:
    _, t, s = raster.images.attended.shape
    is_causal = np.arange(s)[None] - (s - t) <= np.arange(t)[:, None]
    picture = np.where(is_causal[..., None], to_rgb(SKIPPED_COLOR), to_rgb(OUTSIDE_COLOR))
    for share, segment in zip(raster.images.attended, raster.kv_segments, strict=True):
        picture += share[..., None] * (np.array(to_rgb(_color(segment))) - to_rgb(SKIPPED_COLOR))
    _show(axes, picture, "before: queries and keys in prompt order")
    for first, end, name, color in _spans(layout):
        low, high = first / raster.num_keys, end / raster.num_keys
        label = name if high - low > SMALLEST_LABEL else ""
        _strip_below(axes, low, high, color, label)
        _strip_left(axes, low, high, color, label)


def _draw_after(axes: Axes, raster: Raster) -> None:
    rows, columns = raster.images.kept.shape
    picture = np.broadcast_to(np.array(to_rgb(OUTSIDE_COLOR)), (rows, columns, 3)).copy()
    for q_segment in raster.q_segments:
        for kv_segment in raster.kv_segments:
            y, x = (_pixel_slice(segment, raster) for segment in (q_segment, kv_segment))
            color = np.array(to_rgb(_color(kv_segment)))
            kept, computed = raster.images.kept[y, x, None], raster.images.computed[y, x, None]
            strength = kept + TINT * (computed - kept)
            picture[y, x] = to_rgb(SKIPPED_COLOR) + strength * (color - to_rgb(SKIPPED_COLOR))
    _show(axes, picture, "after: what the kernel computes, tile by tile")
    for segment in raster.kv_segments:
        x = _pixel_slice(segment, raster)
        is_narrow = x.stop - x.start < 2 * SMALLEST_LABEL * columns
        label = "" if is_narrow else segment.name
        _strip_below(axes, x.start / columns, x.stop / columns, _color(segment), label)
    for segment in raster.q_segments:
        y = _pixel_slice(segment, raster)
        _strip_left(axes, y.start / rows, y.stop / rows, QUERIES_COLOR, segment.name)


def _show(axes: Axes, picture: np.ndarray, title: str) -> None:
    axes.imshow(np.clip(picture, 0, 1), interpolation="nearest", aspect="auto")
    axes.set_title(title, fontsize=11)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _strip_below(axes: Axes, low: float, high: float, color: str, name: str) -> None:
    """A coloured bar under an image, from and to shares of its width, with its name."""
    corner = (low, -1.5 * STRIP)
    axes.add_patch(Rectangle(corner, high - low, STRIP, transform=axes.transAxes, color=color, clip_on=False, lw=0))
    middle = (low + high) / 2
    axes.text(middle, corner[1] - 0.01, name, transform=axes.transAxes, fontsize=9, ha="center", va="top")


def _strip_left(axes: Axes, low: float, high: float, color: str, name: str) -> None:
    """A coloured bar beside an image, from and to shares of its height counted from the top, with its name."""
    corner = (-1.5 * STRIP, 1 - high)
    axes.add_patch(Rectangle(corner, STRIP, high - low, transform=axes.transAxes, color=color, clip_on=False, lw=0))
    middle = 1 - (low + high) / 2
    x = corner[0] - 0.008
    axes.text(x, middle, name, transform=axes.transAxes, fontsize=9, ha="right", va="center", rotation=90)


def _spans(layout: TokenLayout) -> Iterator[tuple[int, int, str, str]]:
    """First token, end, name and colour of each stretch of one modality and video."""
    modality, video = np.asarray(layout.modality), np.asarray(layout.video)
    kind = np.stack([modality, np.where(modality == VISION, video, -1)])
    cuts = [0, *(np.flatnonzero((kind[:, 1:] != kind[:, :-1]).any(axis=0)) + 1), kind.shape[1]]
    num_videos = len(np.unique(video[modality == VISION]))
    for first, end in zip(cuts, cuts[1:], strict=False):
        match int(modality[first]):
            case -1:
                continue
            case m if m == TEXT:
                name, color = "text", TEXT_COLOR
            case m if m == VISION:
                name, color = "video" if num_videos == 1 else f"video {video[first]}", VISION_COLOR
            case m:
                name, color = f"modality {m}", OTHER_COLOR
        yield int(first), int(end), name, color


def _legend(raster: Raster, plan: Plan, layout: TokenLayout) -> list[Patch]:
    handles = [Patch(color=color, label=name) for name, color in _kinds(layout).items()]
    found = {segment.name: _color(segment) for segment in raster.kv_segments}
    handles += [Patch(color=color, label=f"through {name}") for name, color in found.items()]
    tinted = np.array(to_rgb(SKIPPED_COLOR)) * (1 - TINT) + TINT * np.array(to_rgb(KEYS_COLOR))
    tile = f"tile of {plan.index.block_q} x {plan.index.block_kv}"
    handles.append(Patch(color=tuple(tinted), label=f"masked inside a {tile}"))
    handles.append(Patch(color=SKIPPED_COLOR, label="not visited"))
    return handles


def _kinds(layout: TokenLayout) -> dict[str, str]:
    """Colours of the modalities that the prompt holds, by name."""
    return {name.split(" ")[0]: color for *_, name, color in _spans(layout)}


def _color(segment: Segment) -> str:
    return {KEYS: KEYS_COLOR, GATHERED: GATHERED_COLOR}.get(segment.name, REGROUPED_COLOR)


def _pixel_slice(segment: Segment, raster: Raster) -> slice:
    return slice(segment.pixel, segment.pixel - (-(segment.end - segment.first) // raster.tokens_per_pixel))
