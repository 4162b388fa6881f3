"""Figures of masks: one head's attention before permutation, and after it as the kernel computes it."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mmi_jax.layout import TEXT, VISION, TokenLayout
from mmi_jax.method.plan import Plan
from mmi_jax.plots.mask_raster import GATHERED, KEYS, Raster, Segment, mask_image, rasterize
from pallas_kernels.notation import AnyArray, Bool, Float

KEYS_COLOR, REGROUPED_COLOR, GATHERED_COLOR = "#33658a", "#e4572e", "#2a9d8f"
QUERIES_COLOR, SKIPPED_COLOR, OUTSIDE_COLOR = "#555555", "#ececec", "#ffffff"
TEXT_COLOR, VISION_COLOR, OTHER_COLOR = "#9aa5b1", "#f2b134", "#b39ddb"
TINT = 0.28
"""Strength of the colour of pairs that are computed with a tile and then masked."""

WIDTH, MAX_HEIGHT = 13.0, 9.0
"""Width of a picture, and height of the images in it, at most; inches."""

MARGINS = (1.3, 1.6)
"""Width and height that names, title and legend take; inches."""

STRIP = 0.025
"""Width of the strips that say where text and video are; fraction of an image."""

MIN_LABEL = 0.07
"""Fraction of an axis below which a span is drawn without its name."""


def figure_of_plan(plan: Plan, head: int, layout: TokenLayout | None, *, title: str) -> Figure:
    """One head of a plan: at the left in prompt order, at the right as the kernel computes it."""
    raster = rasterize(plan, head, gap=10)
    rows, columns = raster.images.kept.shape
    # Both images are equally high; MARGINS are left to names, title and legend.
    ratio = columns / rows
    height = min((WIDTH - MARGINS[0]) / (1 + ratio), MAX_HEIGHT)
    figure = Figure(figsize=((1 + ratio) * height + MARGINS[0], height + MARGINS[1]), dpi=130)
    grid = figure.add_gridspec(1, 2, width_ratios=(1, ratio), wspace=0.13)
    left, right = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    colors = [_color(segment) for segment in raster.kv_segments]
    _draw_before(left, raster.images.attended, colors)
    _draw_spans(left, layout, raster.num_keys)
    _draw_after(right, raster)
    through = {segment.name: color for segment, color in zip(raster.kv_segments, colors, strict=True)}
    tinted = np.array(to_rgb(SKIPPED_COLOR)) * (1 - TINT) + TINT * np.array(to_rgb(KEYS_COLOR))
    tile = f"tile of {plan.index.block_q} x {plan.index.block_kv}"
    handles = [Patch(color=color, label=f"through {name}") for name, color in through.items()]
    handles.append(Patch(color=tuple(tinted), label=f"masked inside a {tile}"))
    _finish(figure, height, layout, handles, "not visited", title)
    return figure


def figure_of_mask(mask: Bool[AnyArray, "t s"], layout: TokenLayout | None, *, title: str) -> Figure:
    """A mask in prompt order."""
    height = WIDTH / 2 - MARGINS[0]
    figure = Figure(figsize=(height + MARGINS[0], height + MARGINS[1]), dpi=130)
    axes = figure.add_subplot()
    _draw_before(axes, mask_image(np.asarray(mask))[None], [KEYS_COLOR])
    _draw_spans(axes, layout, mask.shape[1])
    _finish(figure, height, layout, [Patch(color=KEYS_COLOR, label="attended")], "not attended", title)
    return figure


def _finish(
    figure: Figure, height: float, layout: TokenLayout | None, handles: list[Patch], skipped: str, title: str
) -> None:
    """Margins, title and legend."""
    total = height + MARGINS[1]
    figure.subplots_adjust(left=0.72 / figure.get_figwidth(), right=0.995, top=1 - 0.75 / total, bottom=0.85 / total)
    kinds = {name.split(" ")[0]: color for *_, name, color in _spans(layout)}
    handles = [Patch(color=color, label=name) for name, color in kinds.items()] + handles
    handles.append(Patch(color=SKIPPED_COLOR, label=skipped))
    figure.suptitle(title, fontsize=13, x=0.72 / figure.get_figwidth(), ha="left")
    figure.legend(handles=handles, loc="lower center", ncols=6, frameon=False, fontsize=9)


def _draw_before(axes: Axes, attended: Float[np.ndarray, "n t s"], colors: Sequence[str]) -> None:
    """Fractions of each pixel that is attended, each in another colour, over the causal triangle."""
    _, t, s = attended.shape
    is_causal = np.arange(s)[None] - (s - t) <= np.arange(t)[:, None]
    picture = np.where(is_causal[..., None], to_rgb(SKIPPED_COLOR), to_rgb(OUTSIDE_COLOR))
    for fraction, color in zip(attended, colors, strict=True):
        picture += fraction[..., None] * (np.array(to_rgb(color)) - to_rgb(SKIPPED_COLOR))
    _show(axes, picture, "before: queries and keys in prompt order")


def _draw_spans(axes: Axes, layout: TokenLayout | None, num_keys: int) -> None:
    """Names of text and videos along both axes of a picture in prompt order."""
    for first, end, name, color in _spans(layout):
        low, high = first / num_keys, end / num_keys
        label = name if high - low > MIN_LABEL else ""
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
        is_narrow = x.stop - x.start < 2 * MIN_LABEL * columns
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
    """A coloured bar under an image, from and to fractions of its width, with its name."""
    corner = (low, -1.5 * STRIP)
    axes.add_patch(Rectangle(corner, high - low, STRIP, transform=axes.transAxes, color=color, clip_on=False, lw=0))
    middle = (low + high) / 2
    axes.text(middle, corner[1] - 0.01, name, transform=axes.transAxes, fontsize=9, ha="center", va="top")


def _strip_left(axes: Axes, low: float, high: float, color: str, name: str) -> None:
    """A coloured bar left of an image, from and to fractions of its height counted from the top, with its name."""
    corner = (-1.5 * STRIP, 1 - high)
    axes.add_patch(Rectangle(corner, STRIP, high - low, transform=axes.transAxes, color=color, clip_on=False, lw=0))
    middle = 1 - (low + high) / 2
    x = corner[0] - 0.008
    axes.text(x, middle, name, transform=axes.transAxes, fontsize=9, ha="right", va="center", rotation=90)


def _spans(layout: TokenLayout | None) -> Iterator[tuple[int, int, str, str]]:
    """First token, end, name and colour of each stretch of one modality and video."""
    if layout is None:
        return
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


def _color(segment: Segment) -> str:
    return {KEYS: KEYS_COLOR, GATHERED: GATHERED_COLOR}.get(segment.name, REGROUPED_COLOR)


def _pixel_slice(segment: Segment, raster: Raster) -> slice:
    return slice(segment.pixel, segment.pixel - (-(segment.end - segment.first) // raster.tokens_per_pixel))
