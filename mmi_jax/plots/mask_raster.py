"""Small images of masks: pairs that are attended in prompt order, and those that are computed in permuted order.

Images are made from the block lists, a few queries at a time, so a prompt of any length can be drawn.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from mmi_jax.method.plan import Plan
from pallas_kernels.notation import Bool, Float, Int32
from pallas_kernels.pytree import pytree

KEYS, REGROUPED, GATHERED = "keys in prompt order", "the same keys, regrouped", "gathered columns"
"""Names of the segments along the keys: the first view, other views, and rows gathered per head."""

MAX_PIXELS = 720
"""Width of an image at most; longer prompts put several tokens into one pixel."""

ROWS_PER_PIXEL = 4
"""Queries looked at for each pixel of a prompt too long to look at all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Neighbouring rows of the permuted queries or of the keys, and their place in an image.

    Args:
      name: of these rows.
      first, end: rows of the plan; tokens.
      pixel: where the first row is drawn; `pixel + (row - first) // tokens_per_pixel` is where any other is.
    """

    name: str
    first: int
    end: int
    pixel: int


@pytree
class MaskImages:
    """The images of `rasterize`; the last axis of every image runs along the keys.

    Args:
      attended: fraction of the pairs of each pixel that is attended, by the segment of the key; prompt order.
      computed: fraction of the pairs of each pixel that lies in a visited tile; permuted order.
      kept: fraction of the pairs of each pixel that lies in a visited tile and is attended; permuted order.
    """

    attended: Float[np.ndarray, "n t s"]
    computed: Float[np.ndarray, "r x"]
    kept: Float[np.ndarray, "r x"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raster:
    """The images of a head and the places of queries and keys in them.

    Args:
      num_queries, num_keys: tokens along the image in prompt order.
      tokens_per_pixel: of both images, along both axes.
      q_segments, kv_segments: along the image in permuted order.
    """

    images: MaskImages
    num_queries: int
    num_keys: int
    tokens_per_pixel: int
    q_segments: tuple[Segment, ...]
    kv_segments: tuple[Segment, ...]


@pytree
class _Head:
    """One head's part of a plan, on the host; fields as in `Plan` and `BlockIndex`."""

    order: Int32[np.ndarray, " r"]
    q_pos: Int32[np.ndarray, " r"]
    kv_pos: Int32[np.ndarray, "n sx"]
    key_token: Int32[np.ndarray, " sx"]
    first: Int32[np.ndarray, " i"]
    num_full: Int32[np.ndarray, " i"]
    count: Int32[np.ndarray, " i"]
    start: Int32[np.ndarray, " l"]
    interval: Int32[np.ndarray, " l"]
    intervals: Int32[np.ndarray, "_ 2"]
    pos_row: Int32[np.ndarray, " i"]


def rasterize(plan: Plan, head: int, *, max_pixels: int = MAX_PIXELS, gap: int = 0) -> Raster:
    """Both images of one head.

    Args:
      plan: of one example, of a whole prompt.
      max_pixels: of the image in prompt order, along either axis.
      gap: empty pixels between the segments of the image in permuted order.
    """
    host = _host(plan, head)
    num_queries, num_keys = int(host.order.max()) + 1, int(host.key_token.max()) + 1
    per_pixel = -(-max(num_queries, num_keys) // max_pixels)
    step = max(1, per_pixel // ROWS_PER_PIXEL)
    q_segments = _q_segments(plan, host, per_pixel, gap)
    kv_segments = _kv_segments(plan, host, per_pixel, gap)
    t, s = -(-num_queries // per_pixel), -(-num_keys // per_pixel)
    shape = (_end_pixel(q_segments, per_pixel), _end_pixel(kv_segments, per_pixel))
    images = MaskImages(attended=np.zeros((len(kv_segments), t, s)), computed=np.zeros(shape), kept=np.zeros(shape))
    row_pixel, key_pixel = (
        _pixels(q_segments, len(host.order), per_pixel),
        _pixels(kv_segments, len(host.key_token), per_pixel),
    )
    segment_of_key = np.zeros(len(host.key_token), np.int32)
    for n, segment in enumerate(kv_segments):
        segment_of_key[segment.first : segment.end] = n
    for rows, keys, is_kept in _visits(plan, host, step):
        at = (row_pixel[rows][:, None], key_pixel[keys][None])
        np.add.at(images.computed, at, 1.0)
        np.add.at(images.kept, at, is_kept)
        r, x = np.nonzero(is_kept)
        tokens = host.order[rows][r] // per_pixel, host.key_token[keys][x] // per_pixel
        np.add.at(images.attended, (segment_of_key[keys][x], *tokens), 1.0)
    pairs = per_pixel * -(-per_pixel // step)
    return Raster(
        images=jax.tree.map(lambda image: np.minimum(image / pairs, 1.0), images),
        num_queries=num_queries,
        num_keys=num_keys,
        tokens_per_pixel=per_pixel,
        q_segments=q_segments,
        kv_segments=kv_segments,
    )


def mask_image(mask: Bool[np.ndarray, "t s"], *, max_pixels: int = MAX_PIXELS) -> Float[np.ndarray, "y x"]:
    """Fraction of the pairs of each pixel that a mask in prompt order attends."""
    per_pixel = -(-max(mask.shape) // max_pixels)
    t, s = (-(-n // per_pixel) for n in mask.shape)
    padded = np.pad(mask, [(0, t * per_pixel - mask.shape[0]), (0, s * per_pixel - mask.shape[1])])
    return padded.reshape(t, per_pixel, s, per_pixel).mean(axis=(1, 3))


def _host(plan: Plan, head: int) -> _Head:
    index = plan.index
    extra_order = plan.gathered_order[head]
    parts = dict(
        order=plan.q_order.order[head],
        q_pos=plan.q_pos[head],
        kv_pos=plan.kv_pos,
        key_token=np.concatenate([plan.kv_order, extra_order]),
        **{name: getattr(index, name)[head] for name in ("first", "num_full", "count", "start", "interval")},
        intervals=index.intervals[head],
        pos_row=index.pos_row[head],
    )
    return _Head(**{name: np.asarray(value) for name, value in parts.items()})


def _visits(plan: Plan, host: _Head, step: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each q block: some of its rows, all key rows it visits, and which pairs of them it attends."""
    block_q, block_kv = plan.index.block_q, plan.index.block_kv
    in_block = np.arange(block_kv)
    for i in np.flatnonzero(host.count):
        rows = np.arange(i * block_q, (i + 1) * block_q)
        tokens = host.order[rows]
        rows = rows[np.where(tokens >= 0, tokens, rows) % step == 0]
        entries = host.first[i] + np.arange(host.count[i])
        keys = host.start[entries][:, None] + in_block
        distance = host.q_pos[rows][:, None, None] - host.kv_pos[host.pos_row[i]][keys]
        low, high = host.intervals[host.interval[entries]].T[..., None]
        is_full = (np.arange(len(entries)) < host.num_full[i])[:, None]
        is_kept = is_full | ((distance >= 0) & (distance >= low) & (distance < high))
        is_kept &= (host.q_pos[rows] >= 0)[:, None, None]
        yield rows, keys.ravel(), is_kept.reshape(len(rows), -1)


def _q_segments(plan: Plan, host: _Head, per_pixel: int, gap: int) -> tuple[Segment, ...]:
    """Passes of the queries, without the empty q blocks behind each."""
    num_passes = plan.q_order.inverse.shape[1]
    block_q, rows_per_pass = plan.index.block_q, len(host.order) // num_passes
    blocks_per_pass = rows_per_pass // block_q
    spans = []
    for n in range(num_passes):
        used = np.flatnonzero(host.count[n * blocks_per_pass : (n + 1) * blocks_per_pass])
        if len(used):
            name = "queries" if n == 0 else "the same queries, regrouped"
            spans.append((name, n * rows_per_pass, n * rows_per_pass + int(used[-1] + 1) * block_q))
    return _placed(spans, per_pixel, gap)


def _kv_segments(plan: Plan, host: _Head, per_pixel: int, gap: int) -> tuple[Segment, ...]:
    """Key views and gathered rows that the head visits."""
    block_kv, shared = plan.index.block_kv, len(plan.kv_order)
    view_len = -(-plan.num_keys // block_kv) * block_kv
    entries = [host.start[a : a + n] for a, n in zip(host.first, host.count, strict=True)]
    starts = np.concatenate(entries)
    bounds = [*range(0, shared, view_len), shared, len(host.key_token)]
    spans = []
    for n, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        inside = starts[(starts >= first) & (starts < end)]
        if len(inside):
            name = KEYS if n == 0 else GATHERED if first == shared else REGROUPED
            spans.append((name, first, int(inside.max()) + block_kv))
    return _placed(spans, per_pixel, gap)


def _placed(spans: list[tuple[str, int, int]], per_pixel: int, gap: int) -> tuple[Segment, ...]:
    placed, pixel = [], 0
    for name, first, end in spans:
        placed.append(Segment(name=name, first=first, end=end, pixel=pixel))
        pixel += -(-(end - first) // per_pixel) + gap
    return tuple(placed)


def _end_pixel(segments: tuple[Segment, ...], per_pixel: int) -> int:
    last = segments[-1]
    return last.pixel - (-(last.end - last.first) // per_pixel)


def _pixels(segments: tuple[Segment, ...], num_rows: int, per_pixel: int) -> np.ndarray:
    """The pixel of every row that a segment holds; 0 elsewhere, where nothing is visited."""
    pixel = np.zeros(num_rows, np.int64)
    for segment in segments:
        rows = np.arange(segment.end - segment.first)
        pixel[segment.first : segment.end] = segment.pixel + rows // per_pixel
    return pixel
