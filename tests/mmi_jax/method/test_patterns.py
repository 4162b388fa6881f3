"""What each pattern means: its mask written out by hand, in blocks of one token unless the row says otherwise."""

import dataclasses

import numpy as np
import pytest
from cases import TOKENS, padded_left, plan_of, visit_counts, words

from mmi_jax import (
    AShape,
    BlockTopK,
    Boundary2D,
    Dense,
    Grid,
    Pattern,
    QBoundary,
    SparseTransformerFixed,
    SparseTransformerStrided,
    SwinWindow,
    TokenLayout,
    TriShape,
    VerticalSlash,
)
from mmi_jax.layout import concatenate, text_tokens, vision_tokens
from mmi_jax.method.token_groups import FramePlace, RankPhase, RowPlace
from pallas_kernels.block_lists.block_sizes import Blocks


def blocks_of(num_tokens: int) -> Blocks:
    return Blocks(q=num_tokens, kv=num_tokens, granule=num_tokens)


def favouring(num_tokens: int, *keys: int, queries: int = 1):
    """Scores in which the last queries attend to the given keys alone."""
    scores = np.zeros((num_tokens, num_tokens), np.float32)
    scores[-queries:, list(keys)] = 20
    return scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meaning:
    """A pattern, a prompt, the scores its estimate sees (all equal when None), and the mask that must come out."""

    pattern: Pattern
    layout: TokenLayout
    mask: str
    scores: np.ndarray | None = None
    blocks: Blocks = TOKENS


TEXT6 = text_tokens(6)
VIDEO_2X1X2 = concatenate([text_tokens(2), vision_tokens(3, 1, 2)])
VIDEO_2X2X2 = concatenate([text_tokens(1), vision_tokens(2, 2, 2), text_tokens(1)])
BY_TOKEN = AShape(sink=0, local=1)
grid = Grid(local=1, sink=1, last_q=1)

MEANINGS = {
    "dense": Meaning(pattern=Dense(), layout=text_tokens(4), mask="1000 1100 1110 1111"),
    "dense, unaligned blocks": Meaning(
        pattern=Dense(), layout=text_tokens(5), blocks=blocks_of(4), mask="10000 11000 11100 11110 11111"
    ),
    "a_shape": Meaning(
        pattern=AShape(sink=1, local=2), layout=TEXT6, mask="100000 110000 111000 101100 100110 100011"
    ),
    "a_shape without sinks": Meaning(
        pattern=AShape(sink=0, local=2), layout=TEXT6, mask="100000 110000 011000 001100 000110 000011"
    ),
    "a_shape in blocks of 2: sinks are rounded up, the window is exact": Meaning(
        pattern=AShape(sink=1, local=2), layout=text_tokens(7), blocks=blocks_of(2),
        mask="1000000 1100000 1110000 1111000 1101100 1100110 1100011",
    ),
    "a_shape in blocks of 4": Meaning(
        pattern=AShape(sink=0, local=3), layout=text_tokens(9), blocks=blocks_of(4),
        mask="100000000 110000000 111000000 011100000 001110000 000111000 000011100 000001110 000000111",
    ),
    "tri_shape": Meaning(
        pattern=TriShape(sink=1, local=2, last=1), layout=TEXT6, mask="100000 110000 111000 101100 100110 111111"
    ),
    "tri_shape in blocks of 2: the last query has a separate block": Meaning(
        pattern=TriShape(sink=1, local=1, last=1), layout=TEXT6, blocks=blocks_of(2),
        mask="100000 110000 111000 110100 110010 111111",
    ),
    "vertical_slash": Meaning(
        pattern=VerticalSlash(vertical=2, slash=2, local=1, last_q=1), layout=TEXT6, scores=favouring(6, 2),
        mask="100000 110000 101000 101100 111010 101001",
    ),
    "vertical_slash, the last two queries agree on a column": Meaning(
        pattern=VerticalSlash(vertical=2, slash=1, local=1, last_q=2), layout=TEXT6, scores=favouring(6, 3, queries=2),
        mask="100000 110000 101000 100100 100110 100101",
    ),
    "grid": Meaning(
        pattern=dataclasses.replace(grid, use_slash=True), layout=VIDEO_2X1X2, scores=favouring(8, 2, 4, 6),
        mask="10000000 11000000 11100000 10110000 11111000 10111100 11111110 10111111",
    ),
    "grid, horizontal lines": Meaning(
        pattern=dataclasses.replace(grid, use_vline=False), layout=VIDEO_2X1X2, scores=favouring(8, 3, 5),
        mask="10000000 11000000 10100000 11110000 10001000 11111100 10000010 11111111",
    ),
    "grid, vertical lines": Meaning(
        pattern=dataclasses.replace(grid, use_hline=False), layout=VIDEO_2X1X2, scores=favouring(8, 3, 5),
        mask="10000000 11000000 10100000 10010000 10011000 10010100 10010110 10010101",
    ),
    "grid, slashes": Meaning(
        pattern=dataclasses.replace(grid, use_hline=False, use_vline=False, use_slash=True), layout=VIDEO_2X1X2,
        scores=favouring(8, 3, 5),
        mask="10000000 11000000 10100000 10010000 10101000 10010100 10101010 10010101",
    ),
    "grid, by frame: the place in row 1, column 0": Meaning(
        pattern=dataclasses.replace(grid, use_hline=False, tail=0), layout=VIDEO_2X2X2, scores=favouring(10, 3, 7),
        mask="1000000000 1100000000 1010000000 1001000000 1001100000 "
        "1001010000 1001001000 1001000100 1001000110 1001000101",
    ),
    "grid, by row: column 1 of every row, and the text after the video sees everything": Meaning(
        pattern=grid, layout=VIDEO_2X2X2, scores=favouring(10, 2, 4, 6, 8),
        mask="1000000000 1100000000 1110000000 1011000000 1111100000 "
        "1010110000 1111111000 1010101100 1111111110 1111111111",
    ),
    "grid, by rank: every third vision token, across the text between frames": Meaning(
        pattern=dataclasses.replace(grid, strides=(RankPhase(3), RankPhase(4)), use_hline=False, tail=0),
        layout=words("t v v t v v v v t"), scores=favouring(9, 2, 6),
        mask="100000000 110000000 101000000 101100000 101010000 101001000 101000100 101000110 101000101",
    ),
    "block_top_k": Meaning(
        pattern=BlockTopK(num_blocks=3), layout=text_tokens(5),
        scores=np.array([[0] * 5, [0] * 5, [0] * 5, [0, 9, 1, 0, 9], [0, 1, 2, 3, 0]], np.float32),
        mask="10000 11000 11100 11010 10011",
    ),
    "block_top_k in blocks of 2": Meaning(
        pattern=BlockTopK(num_blocks=2), layout=text_tokens(6), blocks=blocks_of(2), scores=favouring(6, 2),
        mask="100000 110000 111000 111100 110010 110011",
    ),
    "q_boundary": Meaning(pattern=QBoundary({1: BY_TOKEN}), layout=words("t v v t"), mask="1000 0100 0010 1111"),
    "q_boundary over three modalities": Meaning(
        pattern=QBoundary({1: BY_TOKEN, 2: AShape(sink=1, local=2)}), layout=words("t v a v t a"),
        mask="100000 010000 111000 000100 111110 100011",
    ),
    "boundary_2d": Meaning(pattern=Boundary2D({(1, 1): BY_TOKEN}), layout=words("t v v t"), mask="1000 1100 1010 1111"),
    "boundary_2d over three modalities: each window counts positions, sinks are the group's first keys": Meaning(
        pattern=Boundary2D({(1, 1): BY_TOKEN, (2, 1): AShape(sink=1, local=2), (0, 2): BY_TOKEN}),
        layout=words("t v a v v a t"),
        mask="1000000 1100000 1110000 1011000 1010100 1110110 1101101",
    ),
    "fixed": Meaning(
        pattern=SparseTransformerFixed(stride=3), layout=TEXT6, mask="100000 110000 111000 100100 100110 100111"
    ),
    "strided": Meaning(
        pattern=SparseTransformerStrided(stride=2), layout=TEXT6, mask="100000 110000 111000 011100 101110 010111"
    ),
    "swin": Meaning(
        pattern=SwinWindow(frames=1, rows=2, columns=1, sink=0), layout=VIDEO_2X2X2,
        mask="1000000000 0100000000 0010000000 0101000000 0010100000 "
        "0000010000 0000001000 0000010100 0000001010 1111111111",
    ),
    "swin, shifted, with a sink": Meaning(
        pattern=SwinWindow(frames=1, rows=2, columns=2, is_shifted=True, sink=1),
        layout=concatenate([text_tokens(1), vision_tokens(1, 2, 3)]),
        mask="1000000 1100000 1010000 1011000 1000100 1000010 1000011",
    ),
    "an image attends to itself in both directions": Meaning(
        pattern=Dense(), layout=words("t [ v v v ] t"), mask="10000 11110 11110 11110 11111"
    ),
    "a window counts positions: an image of one position is one step": Meaning(
        pattern=AShape(sink=0, local=2), layout=words("t t [ v v ] t t"),
        mask="100000 110000 011100 011100 001110 000011",
    ),
}  # fmt: skip


def parse(mask: str) -> list[list[int]]:
    return [[int(x) for x in row] for row in mask.split()]


@pytest.mark.parametrize("name", MEANINGS)
def test_meaning(name):
    """The mask, with padding on the right; in blocks of one token also on the left and on both sides."""
    meaning, pads = MEANINGS[name], 3
    num_tokens = meaning.layout.num_tokens
    s = num_tokens + pads
    for on_left in (0, 1, 3) if meaning.blocks == TOKENS else (0,):
        layout = padded_left(meaning.layout, on_left).pad_to(s)
        tokens = slice(on_left, on_left + num_tokens)
        q, k = np.zeros((s, 1, s), np.float32), np.eye(s, dtype=np.float32)[:, None]
        if meaning.scores is not None:
            q[tokens, 0, tokens] = meaning.scores
        visits = visit_counts(plan_of(meaning.pattern, layout, q=q, k=k, blocks=meaning.blocks))[0]
        assert visits[tokens, tokens].tolist() == parse(meaning.mask), f"{on_left=}"
        assert visits.sum() == visits[tokens, tokens].sum(), f"padding is attended, {on_left=}"


CHUNK = {
    "dense": (Dense(), "11110 11111"),
    "a_shape": (AShape(sink=1, local=2), "10110 10011"),
    "tri_shape": (TriShape(sink=1, local=2, last=1), "10110 11111"),
    "fixed": (SparseTransformerFixed(stride=3), "10010 10011"),
    "strided": (SparseTransformerStrided(stride=2), "01110 10111"),
}


@pytest.mark.parametrize("name", CHUNK)
def test_a_chunk_of_queries_sees_what_the_same_rows_of_the_prompt_see(name):
    pattern, mask = CHUNK[name]
    q, k = np.zeros((2, 1, 5), np.float32), np.zeros((5, 1, 5), np.float32)
    plan = plan_of(pattern, text_tokens(5), q=q, k=k, blocks=TOKENS)
    assert visit_counts(plan)[0].tolist() == parse(mask)


def test_a_chunk_may_lie_in_the_middle_of_the_keys():
    q, k = np.zeros((2, 1, 6), np.float32), np.zeros((6, 1, 6), np.float32)
    plan = plan_of(AShape(sink=1, local=2), TEXT6, q=q, k=k, q_start=3, blocks=TOKENS)
    assert visit_counts(plan)[0].tolist() == parse("101100 100110")


def test_heads_with_different_patterns_keep_their_order():
    patterns = [AShape(sink=1, local=2), Dense(), SparseTransformerStrided(stride=2), Dense(), AShape(sink=1, local=2)]
    masks = ["100000 110000 111000 101100 100110 100011", "100000 110000 111000 111100 111110 111111",
             "100000 110000 111000 011100 101110 010111"]  # fmt: skip
    coverage = visit_counts(plan_of(patterns, TEXT6, blocks=TOKENS))
    assert coverage.tolist() == [parse(masks[n]) for n in (0, 1, 2, 1, 0)]


WRONG = {
    "AShape.sink must be at least 0, got -1": lambda: AShape(sink=-1),
    "AShape.local must be at least 1, got 0": lambda: AShape(local=0),
    "TriShape.last must be at least 1, got 0": lambda: TriShape(last=0),
    "VerticalSlash.vertical must be at least 1, got 0": lambda: VerticalSlash(vertical=0),
    "VerticalSlash.slash must be at least 1, got 0": lambda: VerticalSlash(slash=0),
    "Grid.local must be at least 1, got 0": lambda: Grid(local=0),
    "Grid.strides must name at least one stride": lambda: Grid(strides=()),
    "Grid needs at least one of use_hline": lambda: Grid(use_hline=False, use_vline=False),
    "BlockTopK.num_blocks must be at least 2, got 1": lambda: BlockTopK(num_blocks=1),
    "SparseTransformerStrided.stride must be at least 2": lambda: SparseTransformerStrided(stride=1),
    "SparseTransformerFixed.stride must be at least 2": lambda: SparseTransformerFixed(stride=1),
    "SwinWindow.rows must be at least 1, got 0": lambda: SwinWindow(rows=0),
    "QBoundary.inner must map at least one modality": lambda: QBoundary({}),
    "Boundary2D.inner must map at least one modality": lambda: Boundary2D({}),
    r"QBoundary.inner\[1\] must be an intra-modality pattern, got QBoundary": lambda: QBoundary(
        {1: QBoundary({1: Dense()})}
    ),
    r"Boundary2D.inner\['other'\] must be an intra-modality pattern": lambda: Boundary2D(
        {(1, 1): Dense()}, other=QBoundary({1: Dense()})
    ),
    "a stride must be at least 2 tokens, got 1": lambda: RankPhase(1),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_pattern_refuses_what_it_cannot_mean(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


def test_patterns_are_values():
    assert QBoundary({1: BY_TOKEN}) == QBoundary({1: AShape(sink=0, local=1)})
    assert len({QBoundary({1: BY_TOKEN}), QBoundary({1: BY_TOKEN}), QBoundary({2: BY_TOKEN})}) == 2
    assert Grid(strides=(FramePlace(),)) != Grid(strides=(RowPlace(),))
    with pytest.raises(TypeError, match="fixed once it is made"):
        QBoundary({1: BY_TOKEN}).inner[2] = Dense()  # pyright: ignore[reportIndexIssue]
