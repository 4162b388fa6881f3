"""Synthetic structure is recovered: strides and phases, columns and diagonals, and one index per modality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import plan_of, video_with_timestamps, visit_counts

from mmi_jax import Boundary2D, Grid, QBoundary, VerticalSlash
from mmi_jax.layout import TEXT, VISION, concatenate, text_tokens, vision_tokens
from mmi_jax.method.plan import prompt_geometry
from mmi_jax.method.query_parts import Scope
from mmi_jax.method.token_groups import FramePlace, RankPhase, RowPlace
from pallas_kernels.block_lists.block_sizes import Blocks

NUM_CASES, NUM_TOKENS, HEAD_DIM = 200, 1024, 32
BLOCKS = Blocks(q=64, kv=64, granule=16)
NUM_FEATURES = 6
GRID = Grid(strides=(FramePlace(), RowPlace()), local=64, sink=4)


def plain(rng):
    rows, columns, frames = draw_video(rng, 800)
    return [vision_tokens(frames, rows, columns)]


def timestamps(rng):
    rows, columns, frames = draw_video(rng, 800, text=4)
    return [video_with_timestamps(frames, rows, columns, timestamp=int(rng.integers(1, 5)))]


def documents(rng):
    rows, columns, frames = draw_video(rng, 500, text=10)
    texts = [text_tokens(int(rng.integers(10, 30)) if rng.random() < 0.2 else 0) for _ in range(frames)]
    return [piece for n in range(frames) for piece in (texts[n], vision_tokens(1, rows, columns, frame=n))]


def two_videos(rng):
    small, large = (
        draw_video(rng, 400, max_rows=4, max_columns=5),
        draw_video(rng, 400, min_rows=5, min_columns=6),
    )
    between = text_tokens(int(rng.integers(1, 30)))
    order = [small, large] if rng.random() < 0.5 else [large, small]
    first, second = (vision_tokens(frames, *size, video=n) for n, (*size, frames) in enumerate(order))
    return [first, between, second]


def draw_video(rng, max_tokens, *, text=0, min_rows=2, max_rows=6, min_columns=3, max_columns=8):
    """Rows, columns and frames, at least six of them, of a video of at most so many tokens."""
    rows, columns = rng.integers((min_rows, min_columns), (max_rows + 1, max_columns + 1)).tolist()
    return rows, columns, int(rng.integers(6, max_tokens // (rows * columns + text) + 1))


PROMPTS = (plain, timestamps, documents, two_videos)


def random_prompt(rng):
    """A prompt of one of the kinds, with text before and after, padded to the bucket."""
    kind = PROMPTS[rng.integers(len(PROMPTS))]
    layout = concatenate([text_tokens(int(rng.integers(4, 40))), *kind(rng), text_tokens(int(rng.integers(1, 50)))])
    return jax.tree.map(np.asarray, layout.pad_to(NUM_TOKENS))


def planted_line(rng, layout, is_by_row: bool):
    """A phase with at least five tokens that the estimate can look at, or None; and which tokens lie on the line."""
    is_vision = layout.modality == VISION
    key = layout.column if is_by_row else layout.row * (layout.column.max() + 1) + layout.column
    num_tokens = np.sum(layout.modality >= 0)
    is_looked_at = is_vision & (layout.pos >= BLOCKS.kv) & (layout.pos < num_tokens - GRID.last_q - GRID.local)
    phases = [p for p in np.unique(key[is_vision]) if np.sum(is_looked_at & (key == p)) >= 5]
    if not phases:
        return None, None
    phase = int(rng.choice(phases))
    return phase, is_vision & (key == phase)


def planted_qk(rng, layout, is_line):
    """q, k [t, d]: noise of one nat, a line, and all that a trained head shows next to it.

    Four sink tokens, five tokens anywhere that everyone attends to, one frame that the question is about, a pull
    towards recent tokens, and half a nat by which every token differs from its neighbours for all queries alike.
    """
    is_vision, is_real = layout.modality == VISION, layout.modality >= 0
    features = np.zeros((NUM_TOKENS, NUM_FEATURES))
    features[:, 0] = is_line
    features[np.flatnonzero(is_real)[:4], 1] = 1
    features[rng.choice(np.flatnonzero(is_vision), 5), 2] = 1
    features[:, 3] = layout.pos / NUM_TOKENS
    features[:, 4] = is_vision & (layout.frame == rng.choice(layout.frame[is_vision]))
    features[:, 5] = rng.normal(size=NUM_TOKENS)
    heights = np.array([rng.uniform(2.5, 5), 8, 7, 4, 4, 0.5]) * HEAD_DIM**0.5
    q, k = rng.normal(size=(2, NUM_TOKENS, HEAD_DIM))
    q[:, :NUM_FEATURES], k[:, :NUM_FEATURES] = heights, features
    return q.astype(np.float32), k.astype(np.float32)


@functools.partial(jax.jit, static_argnames="grid")
def find_lines(q, k, layouts, *, grid):
    def case(args):
        q, k, layout = args
        geometry = prompt_geometry(layout, (grid,), num_queries=NUM_TOKENS, q_start=0, blocks=BLOCKS)
        member = jnp.asarray(geometry.queries.is_real)
        one = dict(q=q, all_k=k[:, None], kv_head=jnp.int32(0))
        lines = grid.find_lines(Scope(**one, geometry=geometry, member=member, scale=HEAD_DIM**-0.5, blocks=BLOCKS))
        return lines.stride, lines.phase

    return jax.lax.map(case, (q, k, layouts), batch_size=20)


@pytest.mark.slow
def test_the_planted_stride_and_phase_are_found_in_every_case(rng):
    layouts, true_lines, inputs = [], [], []
    while len(layouts) < NUM_CASES:
        layout, is_by_row = random_prompt(rng), len(layouts) % 2
        phase, is_line = planted_line(rng, layout, bool(is_by_row))
        if phase is None:
            continue
        layouts.append(layout)
        true_lines.append((is_by_row, phase))
        inputs.append(planted_qk(rng, layout, is_line))
    q, k = (np.stack(x) for x in zip(*inputs, strict=True))
    layouts = jax.tree.map(lambda *x: np.stack(x), *layouts)
    lines = np.stack(find_lines(q, k, layouts, grid=GRID), axis=1)
    missed = np.flatnonzero((lines != np.array(true_lines)).any(axis=1))
    assert not len(missed), (
        f"{len(missed)} of {NUM_CASES} missed: {[(true_lines[n], lines[n].tolist()) for n in missed]}"
    )


def test_without_geometry_the_rank_among_vision_tokens_is_folded(rng):
    layout = concatenate([text_tokens(20), vision_tokens(30, 5, 5), text_tokens(30)]).pad_to(NUM_TOKENS)
    layout = jax.tree.map(np.asarray, layout)
    is_line = (layout.modality == VISION) & ((layout.pos - 20) % 25 == 17)
    q, k = planted_qk(rng, layout, is_line)
    grid = Grid(strides=tuple(map(RankPhase, (16, 24, 25, 26, 30))), local=64, sink=4)
    lines = find_lines(q[None], k[None], jax.tree.map(lambda x: x[None], layout), grid=grid)
    assert [int(x[0]) for x in lines] == [2, 17]


SPARSE = Blocks(q=16, kv=16, granule=1)


def attended(pattern, layout, q, k, blocks=SPARSE):
    return visit_counts(plan_of(pattern, layout, q=q[:, None], k=k[:, None], blocks=blocks, scale=q.shape[1] ** -0.5))[
        0
    ]


def test_planted_columns_and_diagonals_are_in_the_plan(rng):
    """In blocks that start anywhere a chosen diagonal is kept by every query."""
    t, period = 256, 512
    layout, columns, distances = text_tokens(t), [61, 118, 143], np.array([0, 37, 90])
    # A diagonal is a rotary pair: cos(angle of q - angle of k) is 1 at the distance and averages out elsewhere.
    frequency = 2 * np.pi * rng.integers(1, period, 48) / period
    angle, shift = np.arange(t)[:, None] * frequency, distances[:, None, None] * frequency
    wave = lambda x: np.concatenate([np.cos(x), np.sin(x)], axis=-1)  # noqa: E731
    q = np.concatenate([wave(angle - shift).sum(axis=0), np.full((t, 1), 1)], axis=1)
    k = np.concatenate([wave(angle), 34.0 * np.isin(np.arange(t), columns)[:, None]], axis=1)
    q, k = (x.astype(np.float32) for x in (q * 97**0.5 / 4, k))
    pattern = VerticalSlash(vertical=16 + len(columns), slash=len(distances), local=1, last_q=64)
    mask = attended(pattern, layout, q, k)
    causal = np.tril(np.ones((t, t), bool))
    assert (mask[:, columns] == causal[:, columns]).all()
    for distance in distances:
        assert (np.diagonal(mask, -distance) == 1).all(), f"{distance=}"
    assert mask.sum() < 0.6 * causal.sum()


def modality_prompt():
    return concatenate([text_tokens(40), video_with_timestamps(10, 4, 5, timestamp=3), text_tokens(34)])


def test_q_boundary_finds_the_columns_of_each_modality(rng):
    layout, columns = modality_prompt(), {TEXT: [50, 97, 130], VISION: [71, 88, 145]}
    t, keys = layout.num_tokens, np.arange(layout.num_tokens)
    q, k = rng.normal(size=(2, t, 32)).astype(np.float32) * 0.3
    for feature, modality in enumerate((TEXT, VISION)):
        q[:, feature] = 40 * (layout.modality == modality)
        k[:, feature] = np.isin(keys, columns[modality])
    inner = VerticalSlash(vertical=8 + 3, slash=1, local=1, last_q=16)
    mask = attended(QBoundary({TEXT: inner, VISION: inner}), layout, q, k, Blocks(q=1, kv=8, granule=1))
    for modality, others in ((TEXT, VISION), (VISION, TEXT)):
        is_query = layout.modality == modality
        for column in columns[modality]:
            assert (mask[is_query & (keys >= column), column] == 1).all(), f"{modality=} {column=}"
        far = is_query & (keys >= 160)
        assert not mask[far][:, columns[others]].any(), "the other modality's columns are not this one's"


def test_q_boundary_finds_the_phase_of_each_modality(rng):
    layout, phases = modality_prompt(), {TEXT: 7, VISION: 13}
    place = np.where(layout.modality == VISION, layout.row * 5 + layout.column, -1)
    q, k = rng.normal(size=(2, layout.num_tokens, 32)).astype(np.float32) * 0.3
    for feature, modality in enumerate((TEXT, VISION)):
        q[:, feature] = 30 * (layout.modality == modality)
        k[:, feature] = place == phases[modality]
    inner = Grid(strides=(FramePlace(),), use_hline=False, local=16, sink=0, tail=0, last_q=16)
    blocks = Blocks(q=1, kv=1, granule=1)
    mask = attended(QBoundary({TEXT: inner, VISION: inner}), layout, q, k, blocks)
    pos = layout.pos
    for modality, phase in phases.items():
        is_far = (pos[:, None] - pos[None] >= 16) & (layout.modality == modality)[:, None]
        assert ((mask == 1) == (place == phase)[None])[is_far].all(), f"{modality=}"


@pytest.mark.slow
@pytest.mark.parametrize("pair", [(TEXT, VISION), (VISION, VISION), (TEXT, TEXT), (VISION, TEXT)])
def test_boundary_2d_finds_the_columns_of_each_pair(rng, pair):
    layout = modality_prompt()
    keys = np.arange(layout.num_tokens)
    is_query, is_key = (layout.modality == modality for modality in pair)
    of_group = np.flatnonzero(is_key)
    columns = of_group[[len(of_group) // 2 - 3, len(of_group) // 2 + 2]]
    q, k = rng.normal(size=(2, layout.num_tokens, 32)).astype(np.float32) * 0.3
    q[:, 0], k[:, 0] = 40 * is_query, np.isin(keys, columns)
    inner = VerticalSlash(vertical=16 + 2, slash=1, local=1, last_q=16)
    blocks = Blocks(q=16, kv=16, granule=1)
    mask = attended(Boundary2D({pair: inner}), layout, q, k, blocks)
    for column in columns:
        assert (mask[is_query & (keys >= column), column] == 1).all(), f"{column=}"
    within = mask[np.ix_(is_query, is_key)]
    others = np.tril(np.ones_like(mask)) * ~(is_query[:, None] & is_key[None])
    assert within.sum() < 0.6 * np.tril(np.ones_like(mask))[np.ix_(is_query, is_key)].sum()
    assert (mask * ~(is_query[:, None] & is_key[None]) == others).all(), "pairs not listed are dense"
