"""Pattern: what every pattern of the method is, and the scope it plans in."""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from mmi_jax.method import estimate
from mmi_jax.method.kv_views import AllKeys, Geometry, Group, KeyView, View
from mmi_jax.method.query_parts import Columns, Everything, Part, QBlocks, Runs, blocks_between
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.inputs import MIN_CAPACITY
from pallas_kernels.estimate.api import column_mass, line_mass
from pallas_kernels.notation import PAD_KV_POS, Array, Bool, Float, Int32
from pallas_kernels.pytree import pytree, static_field


@pytree
class Scope:
    """One head's queries and keys, and which of them a pattern is asked to plan.

    Args:
      q: the head's queries in prompt order.
      all_k: keys of all kv heads in prompt order, which heads share.
      kv_head: the kv head that this head reads.
      geometry: views of the keys and places of the queries.
      member: the queries to plan.
      scale: factor on the scores.
      group: the keys they may see.
      blocks: tile sizes.
    """

    q: Float[Array, "t d"]
    all_k: Float[Array, "s g d"]
    kv_head: Int32[Array, ""]
    geometry: Geometry
    member: Bool[Array, " t"]
    scale: float = static_field()
    blocks: Blocks = static_field()
    group: Group = static_field(default=AllKeys())

    @property
    def view(self) -> KeyView:
        """The keys of the group in prompt order."""
        return self.geometry.view(self.group)

    @property
    def num_q_blocks(self) -> int:
        """Most q blocks that the members can fill."""
        return self.blocks.round_q(len(self.member)) // self.blocks.q

    @property
    def num_kv_blocks(self) -> int:
        """Kv blocks of the group's view."""
        return len(self.view.order) // self.blocks.kv

    def restrict(self, member=None, group: Group | None = None) -> "Scope":
        """The same head with fewer queries, or with the keys of another group."""
        return dataclasses.replace(
            self,
            member=self.member if member is None else self.member & member,
            group=self.group if group is None else group,
        )

    def all_keys(self):
        """What a part visits that sees every key of the group."""
        if self.group == AllKeys():
            return Everything()
        return self._whole_group

    def _whole_group(self, q_blocks: QBlocks) -> list[Runs]:
        reach = self.view.rank(q_blocks.highest + 1)
        return [blocks_between(self.view, jnp.zeros_like(reach), reach, self.blocks)]

    def bound(self, blocks_per_q_block: int) -> int:
        """A `Part.max_blocks`: so many per q block on average, within reason for small plans."""
        most = self.num_q_blocks * self.num_kv_blocks
        return max(1, min(most, max(MIN_CAPACITY, self.num_q_blocks * blocks_per_q_block)))

    @property
    def group_pos(self):
        """Position of every key token that the group holds, PAD_KV_POS elsewhere; int32 [s]."""
        layout = self.geometry.keys
        return jnp.where(self.group.holds(layout), layout.pos, PAD_KV_POS)

    def last_queries(self, last_q: int):
        """The last members: their queries [last_q, d], positions and tokens; position and token -1 where missing."""
        rows = estimate.last_queries(self.member, last_q)
        q_pos = jnp.where(rows >= 0, self.geometry.q_pos[jnp.maximum(rows, 0)], -1)
        return self.q[jnp.maximum(rows, 0)], q_pos, rows

    def last_mass(self, last_q: int):
        """Attention of the last members over the group's keys, summed over the members, float32 [s]; and their
        positions, -1 where there are fewer.
        """
        q, q_pos, _ = self.last_queries(last_q)
        with jax.named_scope("mmi.estimate"):
            mass = column_mass(
                q[None], self.all_k, self.kv_head[None], q_pos=q_pos[None], kv_pos=self.group_pos[None],
                scale=self.scale,
            )  # fmt: skip
        return mass[0], q_pos

    def last_line_mass(self, last_q: int):
        """Attention of the last members per row of the group's view, float32 [s]; and by distance, counted in rows
        from the last key at or before the member, in bands of one granule, float32 [n].
        """
        q, q_pos, rows = self.last_queries(last_q)
        view, geometry = self.view, self.geometry
        anchor = view.rank(q_pos + 1) - 1
        if self.group == AllKeys():  # rows are the prompt's tokens, then empty ones
            k = jnp.pad(self.all_k, ((0, len(view.order) - len(self.all_k)), (0, 0), (0, 0)))
        else:
            k = self.all_k[jnp.maximum(view.order, 0)]
        kv_pos = jnp.where(view.order >= 0, geometry.keys.pos[jnp.maximum(view.order, 0)], PAD_KV_POS)
        with jax.named_scope("mmi.estimate"):
            columns, bands = line_mass(
                q[None], k, self.kv_head[None], q_pos=q_pos[None], q_row=jnp.where(rows >= 0, anchor, -1)[None],
                kv_pos=kv_pos[None], band=self.blocks.granule, scale=self.scale,
            )  # fmt: skip
        return columns[0], bands[0]


def gathered_columns(scope: Scope, rows: Int32[Array, " x"]) -> Columns:
    """Rows of the group's view as columns, ascending; rows past the view's end, and empty ones, are none."""
    view, num_rows = scope.view, len(scope.geometry.order)
    tokens = view.order.at[rows].get(mode="fill", fill_value=-1)
    hidden = jnp.where(tokens >= 0, view.offset + rows, num_rows)
    return Columns(
        tokens=jnp.pad(tokens, (0, scope.blocks.round_kv(len(rows)) - len(rows)), constant_values=-1),
        is_hidden=jnp.zeros(num_rows, bool).at[hidden].set(True, mode="drop"),
    )


def mean_up_to(most: int | float, num_kv_blocks: int) -> float:
    """Mean over the rows of a causal triangle of `num_kv_blocks` blocks, each of which visits `most` where it can."""
    most = min(most, num_kv_blocks)
    return most - most * (most - 1) / (2 * num_kv_blocks)


class Pattern(abc.ABC):
    """What one head attends to. A subclass is a frozen dataclass, hashable, static under jit.

    A new pattern is one file with `parts`, and `views` if it lays out keys in another order than the prompt's.
    """

    @property
    def reads_scores(self) -> bool:
        """Whether `parts` reads q or k; if not, one plan serves all heads of the pattern."""
        return True

    def views(self, group: Group, blocks: Blocks) -> tuple[View, ...]:
        """Key views that `parts` will ask the geometry for, when the keys are those of `group`."""
        return ()

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks, of `num_kv_blocks`, that a q block typically visits, for cost models; None if unknown."""
        return None

    @abc.abstractmethod
    def parts(self, scope: Scope) -> list[Part]:
        """Parts of the scope's queries; those of view 0 hold each member once."""
