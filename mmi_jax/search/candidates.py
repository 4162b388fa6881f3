"""Candidates: the patterns that a search tries on every head, the paper's Table 4 and ours."""

import dataclasses

from mmi_jax.method.patterns import AShape, BlockTopK, Dense, Grid, Pattern, TriShape, VerticalSlash
from mmi_jax.method.token_groups import FramePlace, RowPlace

FRAME, ROW = (FramePlace(),), (RowPlace(),)

TABLE_4: tuple[Pattern, ...] = (
    Grid(FRAME, use_hline=True, use_vline=False, use_slash=False, local=1024),
    Grid(FRAME, use_hline=False, use_vline=True, use_slash=False, local=1024),
    Grid(FRAME, use_hline=False, use_vline=False, use_slash=True, local=1024),
    Grid(FRAME, use_hline=True, use_vline=True, use_slash=False, local=1024),
    Grid(FRAME, use_hline=False, use_vline=True, use_slash=True, local=1024),
    Grid(FRAME, use_hline=True, use_vline=True, use_slash=True, local=1024),
    Grid(ROW, use_hline=True, use_vline=False, use_slash=False, local=1024),
    Grid(ROW, use_hline=False, use_vline=True, use_slash=False, local=1024),
    Grid(ROW, use_hline=False, use_vline=False, use_slash=True, local=1024),
    Grid(ROW, use_hline=True, use_vline=True, use_slash=False, local=1024),
    Grid(ROW, use_hline=False, use_vline=True, use_slash=True, local=1024),
    Grid(ROW, use_hline=True, use_vline=True, use_slash=True, local=1024),
    AShape(sink=128, local=1024),
    AShape(sink=128, local=2048),
    AShape(sink=128, local=4096),
    VerticalSlash(vertical=1000, slash=1024),
    VerticalSlash(vertical=1000, slash=2048),
    VerticalSlash(vertical=2000, slash=2048),
    VerticalSlash(vertical=1000, slash=3096),
    VerticalSlash(vertical=2000, slash=3096),
    VerticalSlash(vertical=1000, slash=4096),
    VerticalSlash(vertical=2000, slash=4096),
    VerticalSlash(vertical=3500, slash=200),
    VerticalSlash(vertical=1000, slash=2500),
)
"""Paper, Table 4. Its fifth number of a Grid, 1024, is read as the local window (PAPER: section 3.1 does not say)."""

OURS: tuple[Pattern, ...] = (
    Grid(FRAME, use_hline=False, use_vline=False, use_slash=True, local=256),
    Grid(FRAME, use_hline=False, use_vline=True, use_slash=True, local=256),
    Grid(FRAME, use_hline=False, use_vline=True, use_slash=False, local=256),
    AShape(sink=128, local=256),
    TriShape(sink=128, local=256, last=128),
    TriShape(sink=128, local=1024, last=128),
    VerticalSlash(vertical=256, slash=256),
    VerticalSlash(vertical=512, slash=512),
    BlockTopK(num_blocks=8),
    BlockTopK(num_blocks=16),
    BlockTopK(num_blocks=32),
)
"""Cheaper windows, the last queries dense, and whole blocks by pooled score."""

ACROSS: tuple[Pattern, ...] = (
    AShape(sink=128, local=1024),
    AShape(sink=128, local=4096),
    Grid(FRAME, use_hline=False, use_vline=True, use_slash=False, local=256),
    VerticalSlash(vertical=1000, slash=1024),
    VerticalSlash(vertical=1000, slash=4096),
    BlockTopK(num_blocks=16),
)
"""For pairs of different modalities. Most of a video prompt's pairs are within video, so a few rows are enough."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """What a search tries.

    Args:
      within: for whole prompts, for the queries of one modality, and for pairs of one modality.
      across: for pairs of different modalities. Dense need not be listed.
    """

    within: tuple[Pattern, ...] = TABLE_4 + OURS
    across: tuple[Pattern, ...] = ACROSS

    def __post_init__(self):
        """Drops Dense and repetitions; raises ValueError for nothing to try."""
        for name in ("within", "across"):
            unique = tuple(p for p in dict.fromkeys(getattr(self, name)) if p != Dense())
            object.__setattr__(self, name, unique)
        if not self.within:
            raise ValueError("a search needs at least one pattern besides Dense to try, got none")

    def scaled(self, factor: float) -> "Candidates":
        """The same candidates with windows and columns for prompts `factor` times as long as Table 4's 25K tokens."""
        if not 0 < factor:
            raise ValueError(f"sizes are scaled by a positive factor, got {factor}")
        return Candidates(
            within=tuple(_scaled(pattern, factor) for pattern in self.within),
            across=tuple(_scaled(pattern, factor) for pattern in self.across),
        )


SIZE_STEP = 16
"""Scaled sizes are multiples of this, and at least as large; tokens."""

_IN_TOKENS = ("sink", "local", "last", "tail", "vertical", "slash")


def _scaled(pattern: Pattern, factor: float) -> Pattern:
    """The pattern with sizes in tokens multiplied, and blocks likewise but at least two."""

    def tokens(size: int) -> int:
        return max(SIZE_STEP, round(size * factor / SIZE_STEP) * SIZE_STEP)

    names = {field.name: getattr(pattern, field.name) for field in dataclasses.fields(pattern)}  # pyright: ignore[reportArgumentType]
    sizes = {name: tokens(size) for name, size in names.items() if name in _IN_TOKENS and not isinstance(size, bool)}
    if isinstance(pattern, BlockTopK):
        sizes = {"num_blocks": max(2, round(pattern.num_blocks * factor))}
    return dataclasses.replace(pattern, **sizes)  # pyright: ignore[reportArgumentType]


SETS = {
    "table4": Candidates(within=TABLE_4),
    "ours": Candidates(within=OURS),
    "all": Candidates(),
}
"""By the name that `mmi search --candidates` takes."""
