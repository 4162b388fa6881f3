"""BlockTopK: the kv blocks whose pooled keys score best against pooled queries (MInference's block-sparse)."""

import dataclasses

import jax
import jax.numpy as jnp

from mmi_jax.blocks import Blocks
from mmi_jax.parts import Part, QBlocks, Runs
from mmi_jax.patterns.base import Pattern, Scope, mean_up_to
from mmi_jax.patterns.checks import check_at_least


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
        is_row = (view.order >= 0)[:, None]
        num_rows = is_row.reshape(-1, size).sum(axis=1)
        rows = jnp.where(is_row, scope.k[jnp.maximum(view.order, 0)].astype(jnp.float32), 0.0)
        pooled = rows.reshape(-1, size, rows.shape[1]).sum(axis=1)
        pooled /= jnp.maximum(num_rows, 1)[:, None]
        scores = q_blocks.mean(scope.q) @ pooled.T
        block = jnp.arange(scope.num_kv_blocks)
        reach = -(-view.rank(q_blocks.highest + 1) // size)
        is_candidate = (block[None] < reach[:, None]) & (num_rows > 0)[None]
        scores = jnp.where((block == jnp.argmax(num_rows > 0))[None], jnp.finfo(jnp.float32).max, scores)
        scores = jnp.where(self._own_blocks(scope, q_blocks), jnp.inf, scores)
        scores = jnp.where(is_candidate, scores, -jnp.inf)
        best, chosen = jax.lax.top_k(scores, num_chosen)
        is_seen = (best > -jnp.inf).astype(jnp.int32)
        return Runs(start=view.offset + chosen.astype(jnp.int32) * size, num_blocks=is_seen)

    def _own_blocks(self, scope: Scope, q_blocks: QBlocks):
        """True for the kv blocks that hold the position of a query of the q block; bool [i, kv blocks]."""
        view, size = scope.view, scope.blocks.kv
        pos = scope.geometry.q_pos[jnp.maximum(q_blocks.order, 0)]
        begins, ends = view.rank(pos) // size, -(-view.rank(pos + 1) // size)
        step = (q_blocks.order >= 0).astype(jnp.int32)
        i = jnp.arange(len(pos))[:, None]
        edges = jnp.zeros((len(pos), scope.num_kv_blocks + 1), jnp.int32).at[i, begins].add(step).at[i, ends].add(-step)
        return jnp.cumsum(edges, axis=1)[:, :-1] > 0
