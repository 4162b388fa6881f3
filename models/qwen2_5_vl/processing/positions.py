"""Rotary positions on three axes (mRoPE): the place of each token of a prompt in time, row and column."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32

from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.processing.placeholders import Grid, Span, find_spans


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionRule:
    """Rule of positions inside and after a video; published implementations differ on both.

    Fields:
        keeps_fractions: the seconds between two frames are used as they are; else they are truncated to whole seconds.
        continues_after_maximum: a token after a video gets the largest position so far plus one; else the video
            takes up as many positions as an image of its size, and later text reuses time positions of the video.
    """

    keeps_fractions: bool
    continues_after_maximum: bool


EXACT = PositionRule(keeps_fractions=True, continues_after_maximum=True)
"""Fractional seconds, every position after a video unused before: what the training code does. The default."""
TRANSFORMERS_4_57 = PositionRule(keeps_fractions=False, continues_after_maximum=True)
"""transformers 4.57: below one second between frames, all frames have one time position."""
TRANSFORMERS_5_23 = PositionRule(keeps_fractions=True, continues_after_maximum=False)
"""transformers 5.3 to 5.23."""


def mrope_positions(
    tokens: Int[np.ndarray, " t"],
    grids: Sequence[Grid],
    seconds_per_grid: Sequence[float],
    config: Qwen2_5_VLConfig,
    *,
    rule: PositionRule = EXACT,
) -> Int32[np.ndarray, "3 t"]:
    """The time, row and column position of every token of one unpadded prompt.

    Two text tokens, a video of two frames of 1 x 2 tokens with one second between frames (2 steps), a text token:

        time    0  1   2  2  4  4   5
        row     0  1   2  2  2  2   5
        column  0  1   2  3  2  3   5     (4 in all three rows under `TRANSFORMERS_5_23`)

    Args:
        tokens: token ids without padding; a vision token is a placeholder id.
        grids: (frames, rows, columns) in patches of every image and video, in order of appearance.
        seconds_per_grid: seconds from one frame (temporal patch) to the next, one per grid; ignored for images.
        config: the model's; gives the placeholder ids, the merge size and the steps per second.
        rule: which published reading of the positions inside and after a video.

    Raises:
        ValueError: the placeholders do not match the grids, or the seconds do not match their number.
    """
    if len(seconds_per_grid) != len(grids):
        raise ValueError(f"one number of seconds per grid expected: {len(grids)=}, {len(seconds_per_grid)=}")
    pieces, end, next_pos = [], 0, 0
    for span, seconds in zip(find_spans(tokens, grids, config), seconds_per_grid, strict=True):
        pieces.append(_text_positions(span.start - end, next_pos))
        next_pos += span.start - end
        pieces.append(_span_positions(span, seconds, config, rule) + np.int32(next_pos))
        extent = max(span.num_rows, span.num_columns)
        next_pos = int(pieces[-1].max()) + 1 if rule.continues_after_maximum else next_pos + extent
        end = span.stop
    pieces.append(_text_positions(len(tokens) - end, next_pos))
    return np.concatenate(pieces, axis=1)


def _text_positions(num_tokens: int, start: int) -> Int32[np.ndarray, "3 t"]:
    return np.broadcast_to(np.arange(start, start + num_tokens, dtype=np.int32), (3, num_tokens))


def _span_positions(
    span: Span, seconds: float, config: Qwen2_5_VLConfig, rule: PositionRule
) -> Int32[np.ndarray, "3 t"]:
    """Positions of an image or video whose first token is at position 0."""
    place = span.place()
    if span.is_image:
        return place
    if not np.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"the seconds between two frames of a video must be positive and finite, got {seconds=}")
    step = config.tokens_per_second * (seconds if rule.keeps_fractions else int(seconds))
    # float32, as the published code computes it: k * step may fall on the other side of an integer in float64.
    place[0] = (place[0].astype(np.float32) * np.float32(step)).astype(np.int32)
    return place
