"""BlockTopK: the kv blocks whose pooled keys score best against pooled queries (MInference's block-sparse)."""

import dataclasses

import jax
import jax.numpy as jnp

from mmi_jax.method.patterns.base import Pattern, Scope, mean_up_to
from mmi_jax.method.patterns.checks import check_at_least
from mmi_jax.method.query_parts import Part, QBlocks, Runs
from pallas_kernels.block_lists.block_sizes import Blocks

Q_BLOCKS_AT_ONCE = 1024
"""Q blocks whose scores against all kv blocks are held at once: all of them would be quadratic in memory."""


@dataclasses.dataclass(frozen=True)
class BlockTopK(Pattern):
    """For each q block, its `num_blocks` best kv blocks; its queries' own, then the first one, come before all others.

    Args:
      num_blocks: kv blocks that a q block visits; blocks.
    """

    num_blocks: int = 100

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
        reach = -(-view.rank(q_blocks.highest + 1) // size)
        pos = scope.geometry.q_pos[jnp.maximum(q_blocks.order, 0)]
        begins, ends = view.rank(pos) // size, -(-view.rank(pos + 1) // size)
        is_row = (q_blocks.order >= 0).astype(jnp.int32)

        def one(q_block):
            mean, reach, begins, ends, is_row = q_block
            edges = jnp.zeros(len(block) + 1, jnp.int32).at[begins].add(is_row).at[ends].add(-is_row)
            holds_own_position = jnp.cumsum(edges)[:-1] > 0
            scores = jnp.where(is_first, jnp.finfo(jnp.float32).max, pooled @ mean)
            scores = jnp.where(holds_own_position, jnp.inf, scores)
            return jax.lax.top_k(jnp.where((block < reach) & (num_rows > 0), scores, -jnp.inf), num_chosen)

        of_each = (q_blocks.mean(scope.q), reach, begins, ends, is_row)
        best, chosen = jax.lax.map(one, of_each, batch_size=min(len(reach), Q_BLOCKS_AT_ONCE))
        is_seen = (best > -jnp.inf).astype(jnp.int32)
        return Runs(start=view.offset + chosen.astype(jnp.int32) * size, num_blocks=is_seen)


def _pooled_keys(scope: Scope):
    """Mean key of each kv block of the group's view, float32 [kv blocks, d]; and the keys in it."""
    order, size = scope.view.order, scope.blocks.kv
    is_row = order >= 0
    num_rows = is_row.reshape(-1, size).sum(axis=1)
    rows = jnp.where(is_row[:, None, None], scope.all_k[jnp.maximum(order, 0)].astype(jnp.float32), 0.0)
    total = rows.reshape(-1, size, *rows.shape[1:]).sum(axis=1)  # of all kv heads, once for the heads that share them
    return total[:, scope.kv_head] / jnp.maximum(num_rows, 1)[:, None], num_rows
