"""Candidates: the patterns that a search tries on every head, the paper's Table 4 and ours."""

import dataclasses

from mmi_jax.method.patterns import PATTERNS, AShape, BlockTopK, Dense, Grid, Pattern, VerticalSlash
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

OURS: tuple[Pattern, ...] = tuple(pattern for cls in PATTERNS for pattern in cls.search_candidates())
"""Those of each pattern's class: cheaper windows, the last queries dense, and whole blocks by pooled score."""

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
            raise ValueError("a search needs at least one pattern other than Dense to try, got none")

    def scaled(self, factor: float) -> "Candidates":
        """The same candidates with windows and columns for prompts `factor` times as long as Table 4's 25K tokens."""
        if not 0 < factor:
            raise ValueError(f"sizes are scaled by a positive factor, got {factor}")
        return Candidates(
            within=tuple(pattern.scaled(factor) for pattern in self.within),
            across=tuple(pattern.scaled(factor) for pattern in self.across),
        )


SETS = {
    "table4": Candidates(within=TABLE_4),
    "ours": Candidates(within=OURS),
    "all": Candidates(),
}
"""By the name that `mmi search --candidates` takes."""
