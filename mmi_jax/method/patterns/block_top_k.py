"""BlockTopK: the kv blocks whose pooled keys score best against pooled queries (MInference's block-sparse)."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from mmi_jax.method.checks import check_at_least
from mmi_jax.method.patterns.base import Family, Pattern, in_blocks
from mmi_jax.method.patterns.runs import mean_up_to
from mmi_jax.method.query_parts import Part, QBlocks, Runs, Scope
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Array, Float, Int32

Q_BLOCKS_AT_ONCE = 1024
"""Q blocks whose scores against all kv blocks are held at once: all of them would be quadratic in memory."""


@dataclasses.dataclass(frozen=True)
class BlockTopK(Pattern):
    """For each q block, its `num_blocks` best kv blocks; those that hold its queries, then the first one, come first.

    Args:
      num_blocks: kv blocks that a q block visits; blocks.
    """

    num_blocks: int = in_blocks(100)

    family: ClassVar = Family(
        name="block-topk", make=lambda size: BlockTopK(num_blocks=size), min_size=2, unit=128, published=50
    )

    @classmethod
    def example(cls) -> "BlockTopK":
        """An instance for a prompt of about a hundred tokens."""
        return cls(num_blocks=3)

    @classmethod
    def search_candidates(cls) -> tuple[Pattern, ...]:
        """Whole blocks by pooled score, which Table 4 lacks."""
        return cls(num_blocks=8), cls(num_blocks=16), cls(num_blocks=32)

    def __post_init__(self):
        """Raises ValueError for fewer than two blocks."""
        check_at_least(self, num_blocks=2)

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        return mean_up_to(self.num_blocks, num_kv_blocks)

    def parts(self, scope: Scope) -> list[Part]:
        """One part in prompt order."""
        num_chosen = min(self.num_blocks, scope.num_kv_blocks)
        return [
            Part(
                member=scope.member,
                visits=lambda q_blocks: [self._best_blocks(scope, q_blocks, num_chosen)],
                max_blocks=scope.bound(num_chosen),
            )
        ]

    def _best_blocks(self, scope: Scope, q_blocks: QBlocks, num_chosen: int) -> Runs:
        view, size = scope.view, scope.blocks.kv
        pooled, num_rows = _pooled_keys(scope)
        block = jnp.arange(scope.num_kv_blocks)
        is_first = block == jnp.argmax(num_rows > 0)
        reach = -(-view.rank(q_blocks.max_pos + 1) // size)
        pos = scope.geometry.q_pos[jnp.maximum(q_blocks.order, 0)]
        begins, ends = view.rank(pos) // size, -(-view.rank(pos + 1) // size)
        is_row = (q_blocks.order >= 0).astype(jnp.int32)

        def best_of(q_block: tuple[Array, ...]) -> Sequence[Array]:
            mean, reach, begins, ends, is_row = q_block
            edges = jnp.zeros(len(block) + 1, jnp.int32).at[begins].add(is_row).at[ends].add(-is_row)
            holds_a_query = jnp.cumsum(edges)[:-1] > 0
            scores = jnp.where(is_first, jnp.finfo(jnp.float32).max, pooled @ mean)
            scores = jnp.where(holds_a_query, jnp.inf, scores)
            return jax.lax.top_k(jnp.where((block < reach) & (num_rows > 0), scores, -jnp.inf), num_chosen)

        of_each = (q_blocks.mean(scope.q), reach, begins, ends, is_row)
        best, chosen = jax.lax.map(best_of, of_each, batch_size=min(len(reach), Q_BLOCKS_AT_ONCE))
        is_seen = (best > -jnp.inf).astype(jnp.int32)
        return Runs(start=view.offset + chosen.astype(jnp.int32) * size, num_blocks=is_seen)


def _pooled_keys(scope: Scope) -> tuple[Float[Array, "j d"], Int32[Array, " j"]]:
    """Mean key of each kv block of the key set's view, float32; and the number of keys in it."""
    order, size = scope.view.order, scope.blocks.kv
    is_row = order >= 0
    num_rows = is_row.reshape(-1, size).sum(axis=1)
    rows = jnp.where(is_row[:, None, None], scope.all_k[jnp.maximum(order, 0)].astype(jnp.float32), 0.0)
    total = rows.reshape(-1, size, *rows.shape[1:]).sum(axis=1)  # of all kv heads, once for all query heads
    return total[:, scope.kv_head] / jnp.maximum(num_rows, 1)[:, None], num_rows
