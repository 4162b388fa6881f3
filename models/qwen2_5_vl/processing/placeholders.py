"""Spans of the images and videos of a prompt: runs of placeholder tokens matched with grids."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32

from mmi_jax.layout import TokenLayout, concatenate, text_tokens, vision_tokens
from models.qwen2_5_vl.config import Qwen2_5_VLConfig

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The tokens `[start, stop)` of one image or video; sizes in tokens, that is, merged blocks."""

    start: int
    num_frames: int
    num_rows: int
    num_columns: int
    is_image: bool

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.start + self.num_frames * self.num_rows * self.num_columns

    def place(self) -> Int32[np.ndarray, "3 t"]:
        """Frame, row and column of each token."""
        return np.indices((self.num_frames, self.num_rows, self.num_columns), dtype=np.int32).reshape(3, -1)


def num_tokens(grid: Grid, config: Qwen2_5_VLConfig) -> int:
    """Tokens that an image or video of `grid` patches becomes."""
    merge_size = config.vision.merge_size
    num_frames, num_rows, num_columns = grid
    if min(grid) < 1 or num_rows % merge_size or num_columns % merge_size:
        raise ValueError(f"a grid needs rows and columns in positive multiples of {merge_size=}, got {grid=}")
    return num_frames * num_rows * num_columns // config.vision.block_len


def find_spans(tokens: Int[np.ndarray, " t"], grids: Sequence[Grid], config: Qwen2_5_VLConfig) -> list[Span]:
    """The span of every grid, in order of appearance.

    Raises:
        ValueError: the number of placeholders is not what the grids need, a run of them is interrupted or changes its
            id, or a grid of several frames meets image placeholders.
    """
    places = np.flatnonzero((tokens == config.image_token) | (tokens == config.video_token))
    counts = [num_tokens(grid, config) for grid in grids]
    if len(places) != sum(counts):
        raise ValueError(
            f"the prompt must hold one placeholder per vision token: expected {sum(counts)} for {len(grids)} grids "
            f"{tuple(grids)}, got {len(places)}"
        )
    starts = np.cumsum([0, *counts])
    return [_span(tokens, places[starts[i] : starts[i + 1]], grid, i, config) for i, grid in enumerate(grids)]


def _span(tokens: np.ndarray, places: np.ndarray, grid: Grid, number: int, config: Qwen2_5_VLConfig) -> Span:
    start, count = int(places[0]), len(places)
    ids = np.unique(tokens[places])
    if places[-1] != start + count - 1 or len(ids) > 1:
        raise ValueError(
            f"the placeholders of one image or video must be one unbroken run of one id: grid {number} {grid=} needs "
            f"{count} from token {start} on, got ids {ids.tolist()} in tokens {start} to {int(places[-1])}"
        )
    is_image = bool(ids[0] == config.image_token)
    if is_image and grid[0] != 1:
        raise ValueError(f"an image has one frame: grid {number} {grid=} has image placeholders")
    merge_size = config.vision.merge_size
    return Span(
        start=start,
        num_frames=grid[0],
        num_rows=grid[1] // merge_size,
        num_columns=grid[2] // merge_size,
        is_image=is_image,
    )


def token_layout(tokens: Int[np.ndarray, " t"], grids: Sequence[Grid], config: Qwen2_5_VLConfig) -> TokenLayout:
    """Modality and place of every token of one unpadded prompt; frames, rows and columns in merged coordinates.

    Raises:
        ValueError: as `find_spans`.
    """
    pieces, end = [], 0
    for number, span in enumerate(find_spans(tokens, grids, config)):
        pieces.append(text_tokens(span.start - end))
        pieces.append(vision_tokens(span.num_frames, span.num_rows, span.num_columns, video=number))
        end = span.stop
    pieces.append(text_tokens(len(tokens) - end))
    return concatenate(pieces)
