"""Vertical-Slash: the columns and diagonals on which the last queries spend most attention (MInference 1.0, Alg. 2)."""

import dataclasses

import jax
import jax.numpy as jnp

from mmi_jax.method.patterns.base import Pattern, Scope, gathered_columns, mean_up_to
from mmi_jax.method.patterns.checks import check_at_least
from mmi_jax.method.query_parts import Columns, Part, Runs
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.integers import floor_divide
from pallas_kernels.estimate.top_k import largest_places

BANDS_AT_ONCE = 64
"""Bands laid out per step of a loop: on an accelerator a step costs kernel launches, whatever its size."""


@dataclasses.dataclass(frozen=True)
class VerticalSlash(Pattern):
    """A few key columns that all queries see, and a few diagonals at fixed distances.

    Columns {0, 2} and diagonals {0, 3} over 6 tokens:

        1 0 0 0 0 0
        1 1 0 0 0 0
        1 0 1 0 0 0
        1 0 1 1 0 0
        1 1 1 0 1 0
        1 0 1 0 0 1

    Columns are exact to the token and gathered into kv blocks of their own; the first kv block of keys is always among
    them. Diagonals are kept in bands one granule wide and computed in whole tiles that start at any granule, so
    neighbours of a chosen diagonal inside a tile are attended too, and at a distance that is not a multiple of the
    granule at most half a granule of queries at an edge of their q block miss it. Distance is counted in keys of the
    group, from the last key at or before the query.

    Args:
      vertical: columns, the forced first block included; tokens.
      slash: diagonals, the forced nearest ones included; tokens.
      local: nearest diagonals that are always kept (100 in MInference); tokens.
      last_q: queries that the estimate reads.
    """

    vertical: int = 1000
    slash: int = 4096
    local: int = 100
    last_q: int = 64

    def __post_init__(self):
        """Raises ValueError for sizes below 1."""
        check_at_least(self, vertical=1, slash=1, local=1, last_q=1)

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        bands = 2 * self.slash / blocks.kv + self.local / blocks.kv  # a band alone crosses two blocks
        return mean_up_to(self.vertical / blocks.kv + bands + 1, num_kv_blocks)

    def parts(self, scope: Scope) -> list[Part]:
        """One part in prompt order, with gathered columns."""
        view, blocks = scope.view, scope.blocks
        column_mass, band_mass = scope.last_line_mass(self.last_q)
        anchor = view.rank(scope.geometry.q_pos + 1) - 1
        bands = self._bands(band_mass, blocks)
        return [
            Part(
                member=scope.member,
                visits=lambda q_blocks: _slash_runs(
                    bands, view.offset, view.rank(q_blocks.lowest), *q_blocks.extent(anchor), blocks
                ),
                max_blocks=scope.bound(len(bands) + 2) + scope.num_kv_blocks,
                columns=(self._columns(column_mass, scope),),
            )
        ]

    def _columns(self, mass, scope: Scope) -> Columns:
        """The heaviest columns, the first keys forced, in order of position."""
        view, blocks = scope.view, scope.blocks
        num_columns = min(max(self.vertical, blocks.kv), len(view.order))
        mass = jnp.where(jnp.cumsum(view.order >= 0) <= blocks.kv, jnp.inf, mass)
        return gathered_columns(scope, largest_places(jnp.where(view.order >= 0, mass, -jnp.inf), num_columns))

    def _bands(self, mass, blocks: Blocks):
        """The heaviest bands of diagonals, the nearest forced, nearest first; int32 [n]."""
        num_forced = -(-self.local // blocks.granule)
        num_bands = min(max(-(-self.slash // blocks.granule), 1), len(mass))
        mass = jnp.where(jnp.arange(len(mass)) < min(num_forced, num_bands), jnp.inf, mass)
        return largest_places(mass, num_bands)


def _slash_runs(bands, offset, first_own, first_anchor, last_anchor, blocks: Blocks) -> list[Runs]:
    """Tiles that cover the bands for queries whose anchors lie between two rows, from the nearest band to the farthest.

    Each band needs the rows its diagonals cross; tiles are laid against the lower edge of what is covered already, so
    they never overlap. The nearest band reaches back to the first key that shares a position with a query, so that a
    query inside an image of one position sees all of it.
    """
    tile = blocks.kv // blocks.granule
    first, end, own = (floor_divide(x, blocks.granule) for x in (first_anchor, last_anchor + blocks.granule, first_own))

    def cover(covered_from, band):
        low = jnp.where(band == 0, jnp.minimum(first, own), first - band)
        high = jnp.minimum(end - band, covered_from)
        number = jnp.where(high > 0, jnp.maximum(-floor_divide(low - high, tile), 0), 0)
        covered_from = jnp.where(number > 0, high - number * tile, covered_from)
        return covered_from, covered_from

    far = jnp.full_like(first, jnp.iinfo(jnp.int32).max)
    _, start = jax.lax.scan(cover, far, bands, unroll=min(BANDS_AT_ONCE, len(bands)))
    covered_before = jnp.concatenate([far[None], start[:-1]])
    high = jnp.minimum(end[None] - bands[:, None], covered_before)
    number = jnp.where(start < covered_before, floor_divide(high - start, tile), 0)
    # Tiles that begin below row 0 hold only the gathered first block.
    num_below = jnp.clip(-floor_divide(start, tile), 0, number)
    rows = (start + num_below * tile) * blocks.granule
    return [Runs(start=(offset + rows).T, num_blocks=(number - num_below).T)]
