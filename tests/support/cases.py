"""The one table of patterns under test, the prompts they are tested on, and how to plan them."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax import (
    AShape,
    BlockTopK,
    Boundary2D,
    Dense,
    Grid,
    Pattern,
    Plan,
    QBoundary,
    SparseTransformerFixed,
    SparseTransformerStrided,
    SwinWindow,
    TokenLayout,
    TriShape,
    VerticalSlash,
)
from mmi_jax.layout import AUDIO, PADDING, TEXT, VISION, concatenate, text_tokens, vision_tokens
from mmi_jax.method.plan import plan_heads, prompt_geometry
from mmi_jax.method.token_groups import RankPhase
from pallas_kernels.block_lists.block_sizes import Blocks

TOKENS = Blocks(q=1, kv=1, granule=1)
"""Blocks of one token: a mask is exactly what the pattern says."""
SMALL = Blocks(q=16, kv=16, granule=4)
"""Blocks with tiles, granules and part boundaries in them, small enough for a prompt of 100 tokens."""

_window, _slashes = AShape(sink=4, local=12), VerticalSlash(vertical=20, slash=24, local=8, last_q=8)
_grid = Grid(local=12, sink=4, tail=8, last_q=8)

PATTERNS: dict[str, Pattern] = {
    "dense": Dense(),
    "a_shape": _window,
    "tri_shape": TriShape(sink=4, local=12, last=10),
    "vertical_slash": _slashes,
    "grid": _grid,
    "grid_vlines_by_rank": Grid(strides=(RankPhase(5), RankPhase(6)), use_hline=False, local=12, sink=4, last_q=8),
    "grid_slashes": Grid(use_slash=True, local=12, sink=4, tail=8, last_q=8),
    "block_top_k": BlockTopK(num_blocks=3),
    "q_boundary": QBoundary({VISION: _grid, TEXT: _slashes}),
    "boundary_2d": Boundary2D({(VISION, VISION): _slashes, (TEXT, VISION): _window, (VISION, TEXT): BlockTopK(2)}),
    "boundary_2d_slashes": Boundary2D({(1, 1): Grid(use_slash=True, local=8, sink=4, last_q=8)}, other=_window),
    "fixed": SparseTransformerFixed(stride=10),
    "strided": SparseTransformerStrided(stride=10),
    "swin": SwinWindow(frames=2, rows=2, columns=2, is_shifted=True, sink=4),
}
"""Each pattern is one row; a new pattern adds one. 14 of them: as heads of one plan they divide by 1, 2 and 7."""


def words(text: str) -> TokenLayout:
    """The layout of a prompt in letters: t text, v vision (frames of one token), a audio, - padding.

    Tokens in square brackets share one position, as an image that attends to itself in both directions.
    """
    letters = text.replace("[", " [ ").replace("]", " ] ").split()
    rows, pos, frame, is_shared = [], -1, -1, False
    for letter in letters:
        if letter in "[]":
            is_shared = letter == "["
            pos += is_shared
            continue
        is_vision, is_padding = letter == "v", letter == "-"
        pos += not (is_shared or is_padding)
        frame += is_vision
        modality = {"t": TEXT, "v": VISION, "a": AUDIO, "-": PADDING}[letter]
        place = (0, frame, 0, 0) if is_vision else (-1,) * 4
        rows.append((modality, *place, PADDING if is_padding else pos))
    columns = np.array(rows, np.int32).T
    names = ("modality", "video", "frame", "row", "column", "pos")
    return TokenLayout(**{name: column.copy() for name, column in zip(names, columns, strict=True)})


def padded_left(layout: TokenLayout, num_padding: int) -> TokenLayout:
    """The layout after `num_padding` padding tokens."""
    return jax.tree.map(lambda x: np.pad(np.asarray(x), (num_padding, 0), constant_values=PADDING), layout)


def video_with_timestamps(num_frames, num_rows, num_columns, *, timestamp=2, video=0) -> TokenLayout:
    """A video with text tokens before every frame, as Qwen3-VL writes them."""
    pieces = []
    for n in range(num_frames):
        pieces += [text_tokens(timestamp), vision_tokens(1, num_rows, num_columns, frame=n, video=video)]
    return concatenate(pieces)


def mixed_prompt() -> TokenLayout:
    """107 tokens: text, a video with timestamps, text, a video of another size, text."""
    pieces = [text_tokens(3), video_with_timestamps(5, 3, 3), text_tokens(7), vision_tokens(5, 1, 8, video=1)]
    return concatenate([*pieces, text_tokens(2)])


QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
"""Plans are compiled far more often than run here, and are integer work: nothing but time depends on it."""


@functools.partial(jax.jit, static_argnames=("patterns", "blocks", "scale"), compiler_options=QUICK_TO_COMPILE)
def _plan(q, k, layout, q_start, *, patterns, blocks, scale):
    geometry = prompt_geometry(layout, patterns, num_queries=q.shape[0], q_start=q_start, blocks=blocks)
    return plan_heads(patterns, q, k, geometry, scale=scale, blocks=blocks)


def plan_of(
    patterns: Pattern | Sequence[Pattern], layout: TokenLayout, *, q=None, k=None, q_start=None, blocks=SMALL, scale=1.0
) -> Plan:
    """The plan of one example; q [t, h, d] and k [s, g, d] are zeros of one dimension when not given."""
    patterns = (patterns,) if isinstance(patterns, Pattern) else tuple(patterns)
    k = jnp.zeros((layout.num_tokens, 1, 1)) if k is None else k
    q = jnp.zeros((layout.num_tokens, len(patterns), 1)) if q is None else q
    q_start = layout.num_tokens - q.shape[0] if q_start is None else q_start
    return _plan(q, k, layout, q_start, patterns=patterns, blocks=blocks, scale=scale)


def causal(layout: TokenLayout) -> np.ndarray:
    """The dense mask of a prompt, [t, s]."""
    pos = np.asarray(layout.pos)
    is_real = pos >= 0
    return (pos[None] <= pos[:, None]) & is_real[None] & is_real[:, None]


def visit_counts(plan: Plan) -> np.ndarray:
    """How often each (query, key) pair is attended, [h, t, s]: `Plan.coverage` without its code, token by token."""
    order, inverse, gathered, row_pos, kv_pos = map(
        np.asarray, (plan.kv_order, plan.q_order.inverse, plan.gathered_order, plan.q_pos, plan.kv_pos)
    )
    index = jax.tree.map(np.asarray, plan.index)
    counts = np.zeros((inverse.shape[0], inverse.shape[2], plan.num_keys), np.int32)
    for h, query_pass, t in np.argwhere(inverse >= 0):
        row, tokens = inverse[h, query_pass, t], np.concatenate([order, gathered[h]])
        i = row // index.block_q
        for n in range(index.count[h, i]):
            entry = index.first[h, i] + n
            keys = slice(index.start[h, entry], index.start[h, entry] + index.block_kv)
            lo, hi = index.intervals[h, index.interval[h, entry]]
            distance = row_pos[h, row].astype(np.int64) - kv_pos[index.pos_row[h, i], keys]
            is_seen = (distance >= max(lo, 0)) & (distance < hi) | (n < index.num_full[h, i])
            assert (tokens[keys][is_seen] >= 0).all(), "an empty row is attended"
            np.add.at(counts[h, t], tokens[keys][is_seen], 1)
    return counts
