"""Vertical-Slash: the columns and diagonals on which the last queries spend most attention (MInference 1.0, Alg. 2)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mmi_jax.method.checks import check_at_least
from mmi_jax.method.patterns.base import Family, Pattern, in_tokens
from mmi_jax.method.patterns.runs import gather_rows, mean_up_to
from mmi_jax.method.query_parts import GatheredRows, Part, Runs, Scope
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.integers import floor_divide
from pallas_kernels.estimate.top_k import largest_places
from pallas_kernels.notation import Array, Float, Int32

BANDS_AT_ONCE = 64
"""Bands covered per step of a loop: on an accelerator a step costs kernel launches, whatever its size."""


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

    Columns are exact to the token and gathered into kv blocks; the first kv block of keys is always among
    them. Diagonals are kept in bands one granule wide and computed in whole tiles that start at any granule, so
    neighbours of a chosen diagonal inside a tile are attended too, and at a distance that is not a multiple of the
    granule at most half a granule of queries at an edge of their q block miss it. Distance is counted in keys of the
    set, from the last key at or before the query.

    Args:
      vertical: columns, the forced first block included; tokens.
      slash: diagonals, the forced nearest ones included; tokens.
      local: nearest diagonals that are always kept (100 in MInference); tokens.
      last_q: queries that the estimate reads.
    """

    vertical: int = in_tokens(1000)
    slash: int = in_tokens(4096)
    local: int = in_tokens(100)
    last_q: int = 64

    # MInference's columns are a quarter of its diagonals (1000 and 4096).
    family: ClassVar = Family(
        name="minference",
        make=lambda size: VerticalSlash(vertical=max(128, size // 4), slash=size),
        min_size=64,
        step=16,
        published=4096,
    )

    @classmethod
    def example(cls) -> "VerticalSlash":
        """An instance for a prompt of about a hundred tokens."""
        return cls(vertical=20, slash=24, local=8, last_q=8)

    @classmethod
    def search_candidates(cls) -> tuple[Pattern, ...]:
        """Fewer lines than those of Table 4."""
        return cls(vertical=256, slash=256), cls(vertical=512, slash=512)

    def __post_init__(self):
        """Raises ValueError for sizes below 1."""
        check_at_least(self, vertical=1, slash=1, local=1, last_q=1)

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        bands = 2 * self.slash / blocks.kv + self.local / blocks.kv  # a band alone crosses two blocks
        return mean_up_to(self.vertical / blocks.kv + bands + 1, num_kv_blocks)

    def parts(self, scope: Scope) -> list[Part]:
        """One part in prompt order, its columns gathered."""
        view, blocks = scope.view, scope.blocks
        column_mass, band_mass = scope.last_line_mass(self.last_q)
        anchor = view.rank(scope.geometry.q_pos + 1) - 1
        bands = self._bands(band_mass, blocks)
        return [
            Part(
                member=scope.member,
                visits=lambda q_blocks: _slash_runs(
                    bands, view.offset, view.rank(q_blocks.min_pos), *q_blocks.extent(anchor), blocks
                ),
                max_blocks=scope.bound(len(bands) + 2) + scope.num_kv_blocks,
                gathered=(self._columns(column_mass, scope),),
            )
        ]

    def _columns(self, mass: Float[Array, " s"], scope: Scope) -> GatheredRows:
        """The heaviest columns, the first keys forced, in order of position."""
        view, blocks = scope.view, scope.blocks
        num_columns = min(max(self.vertical, blocks.kv), len(view.order))
        mass = jnp.where(jnp.cumsum(view.order >= 0) <= blocks.kv, jnp.inf, mass)
        return gather_rows(scope, largest_places(jnp.where(view.order >= 0, mass, -jnp.inf), num_columns))

    def _bands(self, mass: Float[Array, " n"], blocks: Blocks) -> Int32[Array, " m"]:
        """The heaviest bands of diagonals, the nearest forced, nearest first."""
        num_forced = -(-self.local // blocks.granule)
        num_bands = min(max(-(-self.slash // blocks.granule), 1), len(mass))
        mass = jnp.where(jnp.arange(len(mass)) < min(num_forced, num_bands), jnp.inf, mass)
        return largest_places(mass, num_bands)


def _slash_runs(
    bands: Int32[Array, " n"],
    offset: Int32[Array, ""],
    first_self: Int32[Array, " i"],
    first_anchor: Int32[Array, " i"],
    last_anchor: Int32[Array, " i"],
    blocks: Blocks,
) -> list[Runs]:
    """Tiles that cover the bands for queries whose anchors lie between two rows, from the nearest band to the farthest.

    Each band needs the rows its diagonals cross; tiles begin at the lower edge of what is covered already, so
    they never overlap. The nearest band reaches back to the first key at a query's position, so that a query inside an
    image of one position sees all of it.
    """
    tile = blocks.kv // blocks.granule
    first, end, self_row = (
        floor_divide(x, blocks.granule) for x in (first_anchor, last_anchor + blocks.granule, first_self)
    )

    def cover(covered_from: Array, band: Array) -> tuple[Array, Array]:
        low = jnp.where(band == 0, jnp.minimum(first, self_row), first - band)
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
