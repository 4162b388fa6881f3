"""The six pictures of `docs/how_it_works.md`, all of one Grid head: from its mask to the kernel's loop."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from mmi_jax import Plan, TokenLayout
from mmi_jax.layout import VISION
from pallas_kernels import coverage

KEPT, SKIPPED, FUTURE = "#33658a", "#ececec", "#ffffff"
TEXT_COLOR, VISION_COLOR = "#9aa5b1", "#f2b134"
PART_COLORS = ("#33658a", "#2a9d8f", "#e4572e")
PART_NAMES = ("queries with a window", "queries that see everything", "second pass: vision queries, by place")
FULL_COLOR, PARTIAL_COLOR = "#33658a", "#a9c3d9"


def draw_mask(plan: Plan, layout: TokenLayout) -> Figure:
    """The pairs that are attended, in prompt order."""
    mask = np.asarray(plan.to_mask())[0]
    is_causal = np.tri(*mask.shape, dtype=bool)
    figure, axes = _figure(6.0, 6.2, "1. The mask: which keys each query attends to")
    _image(axes, _colors(is_causal, mask))
    _modality_strips(axes, layout)
    axes.set(xlabel="keys, in prompt order", ylabel="queries, in prompt order")
    return figure


def draw_permuted_mask(plan: Plan, layout: TokenLayout) -> Figure:
    """The same pairs with rows and columns reordered: they fill tiles."""
    visits = np.asarray(coverage(plan.index, plan.q_pos, plan.kv_pos))[0] > 0
    figure, axes = _figure(8.0, 6.2, "2. The permuted mask: the same pairs, in few tiles")
    _image(axes, _colors(np.ones_like(visits), visits))
    for heads_of_axis, size, step in (
        (axes.axhline, visits.shape[0], plan.index.block_q),
        (axes.axvline, visits.shape[1], plan.index.block_kv),
    ):
        for place in range(step, size, step):
            heads_of_axis(place - 0.5, color="white", lw=0.4)
    axes.axvline(_keys_in_prompt_order(plan) - 0.5, color="black", lw=1.2)
    axes.set(xlabel="kv views: prompt order | sorted by place in the frame", ylabel="query rows, in permuted order")
    return figure


def draw_query_parts(plan: Plan, layout: TokenLayout) -> Figure:
    """Where each query goes: from prompt order to the rows of its part."""
    order, part = np.asarray(plan.q_order.order)[0], _part_of_row(plan)
    num_tokens = layout.num_tokens
    figure, axes = _figure(9.0, 4.2, "3. Query parts: queries that are planned alike share q blocks")
    scale = len(order) / num_tokens
    for row in np.flatnonzero(order >= 0):
        color = PART_COLORS[part[row]]
        axes.plot([order[row] * scale, row], [1, 0.12], color=color, lw=0.5, alpha=0.35)
    is_vision = np.asarray(layout.modality) == VISION
    _strip(axes, np.where(is_vision[:, None], to_rgb(VISION_COLOR), to_rgb(TEXT_COLOR)), 0, len(order), 1.0)
    rows = np.array([to_rgb(PART_COLORS[p]) for p in part]) * (order >= 0)[:, None] + (order < 0)[:, None]
    _strip(axes, rows, 0, len(order), 0.0)
    for block in range(0, len(order), plan.index.block_q):
        axes.plot([block, block], [0, 0.12], color="white", lw=0.8)
    axes.text(0, 1.15, "prompt: text, video, text", fontsize=9)
    axes.text(
        0, -0.05, "rows of the permuted queries, in q blocks; a part is padded to whole blocks", fontsize=9, va="top"
    )
    axes.set(xlim=(0, len(order)), ylim=(-0.35, 1.3))
    axes.axis("off")
    _legend(figure, dict(zip(PART_NAMES, PART_COLORS, strict=True)))
    return figure


def draw_runs(plan: Plan, layout: TokenLayout) -> Figure:
    """For some q blocks, the runs of kv blocks that they visit."""
    chosen = _example_blocks(plan)
    figure, axes = _figure(9.0, 3.6, "4. Runs: each q block visits a few ranges of neighbouring kv blocks")
    num_columns = plan.kv_order.shape[0]
    for place, (block, part) in enumerate(chosen):
        axes.add_patch(Rectangle((0, place), num_columns, 0.6, color=SKIPPED, lw=0))
        for first, end in _runs(plan, block):
            axes.add_patch(Rectangle((first, place), end - first, 0.6, facecolor=PART_COLORS[part], edgecolor="white"))
        axes.text(-5, place + 0.3, f"q block {block}", fontsize=9, ha="right", va="center")
    axes.axvline(_keys_in_prompt_order(plan), color="black", lw=1.2)
    axes.set(xlim=(-60, num_columns), ylim=(len(chosen), -0.3), yticks=[])
    axes.set_xlabel("kv rows: prompt order | sorted by place in the frame")
    axes.spines[["left", "top", "right"]].set_visible(False)
    _legend(figure, dict(zip(PART_NAMES, PART_COLORS, strict=True)))
    return figure


def draw_block_lists(plan: Plan, layout: TokenLayout) -> Figure:
    """The lists of the same q blocks as the kernel reads them: full blocks first."""
    chosen = _example_blocks(plan)
    figure, axes = _figure(9.0, 3.6, "5. Block lists: first kv row of every visited block, full blocks first")
    most = 14
    for place, (block, _) in enumerate(chosen):
        starts, num_full = _starts(plan, block)
        axes.text(-0.2, place + 0.35, f"q block {block}, count {len(starts)}", fontsize=9, ha="right", va="center")
        for n, start in enumerate(starts[:most]):
            color = FULL_COLOR if n < num_full else PARTIAL_COLOR
            axes.add_patch(Rectangle((n, place), 0.94, 0.7, color=color, lw=0))
            ink = "white" if n < num_full else "black"
            axes.text(n + 0.47, place + 0.35, str(start), fontsize=8, ha="center", va="center", color=ink)
        if len(starts) > most:
            axes.text(most + 0.1, place + 0.35, "...", va="center")
    axes.set(xlim=(-3.2, most + 0.6), ylim=(len(chosen), -0.3))
    axes.axis("off")
    _legend(figure, {"full: no position is compared": FULL_COLOR, "partial: masked inside the tile": PARTIAL_COLOR})
    return figure


def draw_kernel(plan: Plan, layout: TokenLayout) -> Figure:
    """The Hopper kernel's loop over one list: the producer loads ahead, two consumers compute."""
    figure, axes = _figure(9.0, 4.0, "6. The kernel (Hopper): one loop over a list, whatever pattern wrote it")
    lanes = (
        "producer warpgroup",
        "consumer 0: QK, PV",
        "consumer 0: softmax",
        "consumer 1: QK, PV",
        "consumer 1: softmax",
    )
    for lane, name in enumerate(lanes):
        axes.text(-0.15, lane + 0.35, name, ha="right", va="center", fontsize=9)
        axes.add_patch(Rectangle((0, lane), 11, 0.7, color=SKIPPED, lw=0))
    for tile in range(4):
        _box(axes, 2.2 * tile, 0, 1.9, f"load K, V {tile}", "#e4572e")
        start = 1.1 + 2.2 * tile
        for consumer, delay in ((0, 0.0), (1, 1.1)):
            label = f"QK {tile}" + (f", PV {tile - 1}" if tile else "")
            _box(axes, start + delay, 1 + 2 * consumer, 1.05, label, KEPT)
            _box(axes, start + delay + 1.1, 2 + 2 * consumer, 1.05, f"softmax {tile}", "#2a9d8f")
    axes.add_patch(FancyArrowPatch((0, 5.15), (11, 5.15), arrowstyle="-|>", mutation_scale=10, color="black"))
    axes.text(11, 5.4, "time", ha="right", va="center", fontsize=9)
    axes.set(xlim=(-3.0, 11.2), ylim=(5.6, -0.3))
    axes.axis("off")
    return figure


METHOD_PICTURES = {
    "how_1_mask": draw_mask,
    "how_2_permuted_mask": draw_permuted_mask,
    "how_3_query_parts": draw_query_parts,
    "how_4_runs": draw_runs,
    "how_5_block_lists": draw_block_lists,
    "how_6_kernel": draw_kernel,
}
"""File names without suffix, and what draws them from a plan of one head and its layout."""


def _keys_in_prompt_order(plan: Plan) -> int:
    """Rows of the first kv view."""
    return -(-plan.num_keys // plan.index.block_kv) * plan.index.block_kv


def _part_of_row(plan: Plan) -> np.ndarray:
    """The part of each query row: parts of the first pass begin where tokens descend; the second pass is the last."""
    order = np.asarray(plan.q_order.order)[0]
    rows_of_pass = len(order) // plan.q_order.inverse.shape[1]
    part, highest, parts = 0, -1, []
    for token in order[:rows_of_pass]:
        if 0 <= token < highest:
            part, highest = part + 1, -1
        highest = max(highest, token)
        parts.append(part)
    return np.array(parts + [2] * (len(order) - rows_of_pass))


def _example_blocks(plan: Plan) -> list[tuple[int, int]]:
    """Q blocks to show and their parts: two of each part."""
    part = _part_of_row(plan)[:: plan.index.block_q]
    count = np.asarray(plan.index.count)[0]
    of_part = [np.flatnonzero((part == number) & (count > 0)) for number in range(len(PART_NAMES))]
    return [(int(blocks[n]), part) for part, blocks in enumerate(of_part) for n in (len(blocks) // 2, -1)]


def _starts(plan: Plan, block: int) -> tuple[np.ndarray, int]:
    """First kv rows of the blocks that a q block visits, and how many of them are full."""
    index = plan.index
    first, count = int(index.first[0, block]), int(index.count[0, block])
    return np.asarray(index.start)[0, first : first + count], int(index.num_full[0, block])


def _runs(plan: Plan, block: int) -> list[tuple[int, int]]:
    """First and end row of each range of neighbouring blocks."""
    runs: list[tuple[int, int]] = []
    for start in sorted(_starts(plan, block)[0].tolist()):
        end = start + plan.index.block_kv
        if runs and start == runs[-1][1]:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    return figure, axes


def _colors(is_possible: np.ndarray, is_kept: np.ndarray) -> np.ndarray:
    """RGB of each pair: kept, left out, or in the future."""
    picture = np.where(is_possible[..., None], to_rgb(SKIPPED), to_rgb(FUTURE))
    return np.where(is_kept[..., None], to_rgb(KEPT), picture)


def _image(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _modality_strips(axes: Axes, layout: TokenLayout) -> None:
    """Text and video along both axes."""
    is_vision = np.asarray(layout.modality) == VISION
    color = np.where(is_vision[:, None], to_rgb(VISION_COLOR), to_rgb(TEXT_COLOR))
    n, width = len(color), len(color) / 40
    axes.imshow(color[None], extent=(-0.5, n - 0.5, n + 2 * width, n + width), aspect="auto", clip_on=False)
    axes.imshow(color[:, None], extent=(-2 * width, -width, n - 0.5, -0.5), aspect="auto", clip_on=False)
    axes.set(xlim=(-2 * width, n - 0.5), ylim=(n + 2 * width, -0.5))


def _strip(axes: Axes, colors: np.ndarray, left: float, right: float, bottom: float) -> None:
    axes.imshow(colors[None], extent=(left, right, bottom, bottom + 0.12), aspect="auto", interpolation="nearest")


def _box(axes: Axes, x: float, lane: int, width: float, text: str, color: str) -> None:
    axes.add_patch(Rectangle((x, lane), width, 0.7, facecolor=color, edgecolor="white"))
    axes.text(x + width / 2, lane + 0.35, text, ha="center", va="center", fontsize=7.5, color="white")


def _legend(figure: Figure, colors: dict[str, str]) -> None:
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=9)
