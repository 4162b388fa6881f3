"""Step 1 of 9, token groups: an int32 group id per token, computed from the layout alone.

Tokens of one group are alike to a pattern: the same place in every frame, the same column in every row, one window.
Group ids come from coordinates, never from raw positions, so timestamps between frames, several videos of different
sizes and newline tokens do not disturb them. A video of two frames of 1 x 2 tokens between two text tokens, and what
`FramePlace` says of it (`-` is `NO_GROUP`):

    token     t v v v v t
    frame     - 0 0 1 1 -
    column    - 0 1 0 1 -
    group     - 0 1 0 1 -
"""

import dataclasses

import jax.numpy as jnp

from mmi_jax.layout import VISION, TokenLayout
from pallas_kernels.notation import Array, Int32

NO_GROUP = 2**30
"""Group id of a token outside the grouping; larger than every other, so that it sorts last."""


@dataclasses.dataclass(frozen=True)
class FramePlace:
    """The same row and column in every frame: the fold by the frame stride."""

    def of(self, layout: TokenLayout) -> Int32[Array, " t"]:
        """Group id of every token, int32 [t]."""
        num_columns = jnp.max(layout.column, initial=0) + 1
        return jnp.where(layout.frame >= 0, layout.row * num_columns + layout.column, NO_GROUP)


@dataclasses.dataclass(frozen=True)
class RowPlace:
    """The same column in every row of every frame: the fold by the row stride."""

    def of(self, layout: TokenLayout) -> Int32[Array, " t"]:
        """Group id of every token, int32 [t]."""
        return jnp.where(layout.frame >= 0, layout.column, NO_GROUP)


@dataclasses.dataclass(frozen=True)
class RankPhase:
    """The rank among vision tokens modulo `stride`: the paper's fold, for prompts without known geometry."""

    stride: int

    def __post_init__(self):
        """Raises ValueError unless the stride is at least 2."""
        if self.stride < 2:
            raise ValueError(f"a stride must be at least 2 tokens, got {self.stride}")

    def of(self, layout: TokenLayout) -> Int32[Array, " t"]:
        """Group id of every token, int32 [t]."""
        is_vision = layout.modality == VISION
        return jnp.where(is_vision, (jnp.cumsum(is_vision, dtype=jnp.int32) - 1) % self.stride, NO_GROUP)


@dataclasses.dataclass(frozen=True)
class PositionPhase:
    """The position modulo `stride`, for tokens of every modality."""

    stride: int

    def of(self, layout: TokenLayout) -> Int32[Array, " t"]:
        """Group id of every token, int32 [t]."""
        return jnp.where(layout.is_real, layout.pos % self.stride, NO_GROUP)


@dataclasses.dataclass(frozen=True)
class Window3D:
    """Windows of `frames` x `rows` x `columns` vision tokens; shifted by half a window or not."""

    frames: int
    rows: int
    columns: int
    is_shifted: bool = False

    def of(self, layout: TokenLayout) -> Int32[Array, " t"]:
        """Group id of every token, int32 [t]."""
        group = jnp.maximum(layout.video, 0)
        for axis, extent in ((layout.frame, self.frames), (layout.row, self.rows), (layout.column, self.columns)):
            cell = (axis + (extent // 2 if self.is_shifted else 0)) // extent
            group = group * (jnp.max(cell, initial=0) + 1) + cell
        return jnp.where(layout.frame >= 0, group, NO_GROUP)


type Grouping = FramePlace | RowPlace | RankPhase | PositionPhase | Window3D
