"""Step 4 of 9, query parts: the scope that a pattern plans in, and the parts of the queries that it answers with.

A part's queries are planned alike: they fill separate q blocks, and for each of them the part lists runs of kv
blocks. Six queries in two parts, the even ones and the odd ones, in q blocks of 2:

    part      0     1
    queries   0 2 4 1 3 5
    q blocks  0 2 | 4 - | 1 3 | 5 -
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from mmi_jax.method import estimate
from mmi_jax.method.kv_views import AllKeys, Geometry, KeySet, KeyView, View
from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.inputs import MIN_CAPACITY
from pallas_kernels.estimate.api import column_mass, line_mass
from pallas_kernels.notation import PAD_KV_POS, Array, Bool, Float, Int32
from pallas_kernels.pytree import pytree, static_field


@pytree
class Scope:
    """One head's queries and keys, and which of the queries a pattern plans.

    Args:
      q: the head's queries in prompt order.
      all_k: keys of all kv heads in prompt order: one array for all query heads.
      kv_head: the kv head that this head reads.
      geometry: views of the keys, and the queries' coordinates.
      member: the queries to plan.
      scale: factor on the scores.
      key_set: the keys they may see.
      blocks: tile sizes.
    """

    q: Float[Array, "t d"]
    all_k: Float[Array, "s g d"]
    kv_head: Int32[Array, ""]
    geometry: Geometry
    member: Bool[Array, " t"]
    scale: float = static_field()
    blocks: Blocks = static_field()
    key_set: KeySet = static_field(default=AllKeys())

    @property
    def view(self) -> KeyView:
        """The keys of the set in prompt order."""
        return self.geometry.view(self.key_set)

    @property
    def num_q_blocks(self) -> int:
        """Q blocks that the members can fill, at most."""
        return self.blocks.round_q(len(self.member)) // self.blocks.q

    @property
    def num_kv_blocks(self) -> int:
        """Kv blocks of the key set's view."""
        return len(self.view.order) // self.blocks.kv

    def restrict(self, member: Bool[Array, " t"] | None = None, key_set: KeySet | None = None) -> "Scope":
        """The same head with fewer queries, or with another set of keys."""
        return dataclasses.replace(
            self,
            member=self.member if member is None else self.member & member,
            key_set=self.key_set if key_set is None else key_set,
        )

    def bound(self, blocks_per_q_block: int) -> int:
        """A `Part.max_blocks`: so many per q block on average, within reason for small plans."""
        all_blocks = self.num_q_blocks * self.num_kv_blocks
        return max(1, min(all_blocks, max(MIN_CAPACITY, self.num_q_blocks * blocks_per_q_block)))

    @property
    def key_set_pos(self) -> Int32[Array, " s"]:
        """Position of every key token that the set holds, PAD_KV_POS elsewhere."""
        layout = self.geometry.keys
        return jnp.where(self.key_set.holds(layout), layout.pos, PAD_KV_POS)

    def last_queries(self, last_q: int) -> tuple[Array, Array, Array]:
        """The last members: their queries [last_q, d], positions and tokens; position and token -1 where missing."""
        rows = estimate.last_queries(self.member, last_q)
        q_pos = jnp.where(rows >= 0, self.geometry.q_pos[jnp.maximum(rows, 0)], -1)
        return self.q[jnp.maximum(rows, 0)], q_pos, rows

    def last_mass(self, last_q: int) -> tuple[Array, Array]:
        """Attention of the last members over the key set, summed over the members, float32 [s]; and their
        positions, -1 where there are fewer.
        """
        q, q_pos, _ = self.last_queries(last_q)
        with jax.named_scope("mmi.estimate"):
            kv_pos = self.key_set_pos[None]
            mass = column_mass(
                q[None], self.all_k, self.kv_head[None], q_pos=q_pos[None], kv_pos=kv_pos, scale=self.scale
            )
        return mass[0], q_pos

    def last_line_mass(self, last_q: int) -> tuple[Array, Array]:
        """Attention of the last members per row of the key set's view, float32 [s]; and by distance, counted in rows
        from the last key at or before the member, in bands of one granule, float32 [n].
        """
        q, q_pos, rows = self.last_queries(last_q)
        view, geometry = self.view, self.geometry
        anchor = view.rank(q_pos + 1) - 1
        if self.key_set == AllKeys():  # rows are the prompt's tokens, then empty ones
            k = jnp.pad(self.all_k, ((0, len(view.order) - len(self.all_k)), (0, 0), (0, 0)))
        else:
            k = self.all_k[jnp.maximum(view.order, 0)]
        kv_pos = jnp.where(view.order >= 0, geometry.keys.pos[jnp.maximum(view.order, 0)], PAD_KV_POS)
        with jax.named_scope("mmi.estimate"):
            columns, bands = line_mass(
                q[None],
                k,
                self.kv_head[None],
                q_pos=q_pos[None],
                q_row=jnp.where(rows >= 0, anchor, -1)[None],
                kv_pos=kv_pos[None],
                band=self.blocks.granule,
                scale=self.scale,
            )
        return columns[0], bands[0]


@pytree
class QBlocks:
    """The q blocks of a head in permuted order.

    Args:
      order: token of each row, -1 for an empty row.
      min_pos, max_pos: smallest and largest position in each q block; min_pos > max_pos where the block is empty.
    """

    order: Int32[Array, "i q"]
    min_pos: Int32[Array, " i"]
    max_pos: Int32[Array, " i"]

    def extent(self, values: Int32[Array, " t"]) -> tuple[Array, Array]:
        """Smallest and largest value among the tokens of each q block; the wrong way round for an empty block."""
        rows, is_row = values[jnp.maximum(self.order, 0)], self.order >= 0
        big = jnp.iinfo(jnp.int32).max
        return jnp.min(jnp.where(is_row, rows, big), axis=1), jnp.max(jnp.where(is_row, rows, -big), axis=1)

    def mean(self, x: Float[Array, "t d"]) -> Float[Array, "i d"]:
        """Mean over the tokens of each q block, float32; 0 for an empty block."""
        is_row = (self.order >= 0)[..., None]
        rows = jnp.where(is_row, x[jnp.maximum(self.order, 0)].astype(jnp.float32), 0.0)
        return rows.sum(axis=1) / jnp.maximum(is_row.sum(axis=1), 1)


@pytree
class Runs:
    """Runs of consecutive kv blocks: `r` for each q block, ascending or not, never overlapping.

    Args:
      start: first row of the run in the joint kv view, a multiple of the granule.
      num_blocks: blocks in the run; 0 or less visits nothing.
      interval: distances `lo <= q_pos - kv_pos < hi` that the run attends, in tokens.
    """

    start: Int32[Array, "i r"]
    num_blocks: Int32[Array, "i r"]
    interval: tuple[int, int] = static_field(default=(0, NO_LIMIT))


class Everything:
    """Visits every key of the prompt: all such q blocks point to one list."""


@pytree
class GatheredRows:
    """Keys copied into further kv blocks for one head, which every q block of a part visits.

    Args:
      tokens: the gathered keys, ascending, -1 for an empty row; a whole number of kv blocks.
      is_hidden: rows of the joint kv view that the part no longer sees there, because they were gathered.
      number: which of the head's sets this is; parts that name one number visit the same rows.
    """

    tokens: Int32[Array, " x"]
    is_hidden: Bool[Array, " s"]
    number: int = static_field(default=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Queries that are planned alike; each part starts on a new q block.

    Args:
      member: the part's tokens.
      visits: runs of each q block, computed for all q blocks and used for those of the part; or `Everything`.
      max_blocks: bound on the blocks that all q blocks of the part visit together; past it the head runs dense;
        gathered rows are not counted.
      order: token order of the part's rows; prompt order when None.
      query_pass: 0 for the parts that together hold every query once, 1 and on for a further pass over the same
        queries.
      gathered: keys gathered for this part.
    """

    member: Bool[Array, " t"]
    visits: Callable[[QBlocks], list[Runs]] | Everything
    max_blocks: int
    order: Int32[Array, " t"] | None = None
    query_pass: int = 0
    gathered: tuple[GatheredRows, ...] = ()


@runtime_checkable
class PlansQueries(Protocol):
    """A pattern, as far as planning knows it; see `patterns.base.Pattern`. Hashable: it is static under jit."""

    @property
    def reads_scores(self) -> bool:
        """Whether `parts` reads q or k."""
        ...

    def views(self, key_set: KeySet, blocks: Blocks) -> tuple[View, ...]:
        """Key views that `parts` will name."""
        ...

    def parts(self, scope: Scope) -> list[Part]:
        """Parts of the scope's queries."""
        ...
