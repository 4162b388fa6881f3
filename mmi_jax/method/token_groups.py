"""What tokens are grouped by: an int32 key per token, computed from the layout alone.

Tokens of one key are "alike" to a pattern: the same place in every frame, the same column in every row, one window.
Keys read coordinates, never raw positions, so timestamps between frames, several videos of different sizes and
newline tokens do not disturb them.
"""

import dataclasses

import jax.numpy as jnp

from mmi_jax.layout import VISION, TokenLayout

NO_KEY = 2**30
"""Key of a token that stands outside the grouping; larger than every real key, so it sorts last."""


@dataclasses.dataclass(frozen=True)
class FramePlace:
    """The same row and column in every frame: the fold by the frame stride."""

    def of(self, layout: TokenLayout):
        """Key of every token, int32 [t]."""
        num_columns = jnp.max(layout.column, initial=0) + 1
        return jnp.where(layout.frame >= 0, layout.row * num_columns + layout.column, NO_KEY)


@dataclasses.dataclass(frozen=True)
class RowPlace:
    """The same column in every row of every frame: the fold by the row stride."""

    def of(self, layout: TokenLayout):
        """Key of every token, int32 [t]."""
        return jnp.where(layout.frame >= 0, layout.column, NO_KEY)


@dataclasses.dataclass(frozen=True)
class RankPhase:
    """The rank among vision tokens modulo `stride`: the paper's fold, for prompts without known geometry."""

    stride: int

    def __post_init__(self):
        """Raises ValueError unless the stride is at least 2."""
        if self.stride < 2:
            raise ValueError(f"a stride must be at least 2 tokens, got {self.stride}")

    def of(self, layout: TokenLayout):
        """Key of every token, int32 [t]."""
        is_vision = layout.modality == VISION
        return jnp.where(is_vision, (jnp.cumsum(is_vision, dtype=jnp.int32) - 1) % self.stride, NO_KEY)


@dataclasses.dataclass(frozen=True)
class PositionPhase:
    """The position modulo `stride`, for tokens of every modality."""

    stride: int

    def of(self, layout: TokenLayout):
        """Key of every token, int32 [t]."""
        return jnp.where(layout.is_real, layout.pos % self.stride, NO_KEY)


@dataclasses.dataclass(frozen=True)
class Window3D:
    """Windows of `frames` x `rows` x `columns` vision tokens; shifted by half a window or not."""

    frames: int
    rows: int
    columns: int
    is_shifted: bool = False

    def of(self, layout: TokenLayout):
        """Key of every token, int32 [t]."""
        key = jnp.maximum(layout.video, 0)
        for axis, extent in ((layout.frame, self.frames), (layout.row, self.rows), (layout.column, self.columns)):
            cell = (axis + (extent // 2 if self.is_shifted else 0)) // extent
            key = key * (jnp.max(cell, initial=0) + 1) + cell
        return jnp.where(layout.frame >= 0, key, NO_KEY)


type Key = FramePlace | RowPlace | RankPhase | PositionPhase | Window3D
