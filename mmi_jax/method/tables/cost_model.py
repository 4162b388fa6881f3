"""Cost of an attention call by a linear model, and the heads that run faster dense."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mmi_jax.method.patterns.base import Pattern
from mmi_jax.method.patterns.dense import Dense
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.device import has_hopper_gpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """Time of one attention call, linear in what it moves and computes; head_dim 128, 16-bit.

    Args:
      dense_ms, dense_ns_per_tile: a dense causal call: its start, and each tile of 128 x 128 pairs left of or on the
        diagonal.
      sparse_ms: launches of a sparse call.
      plan_ms: launches of each pattern that reads scores, in addition.
      sparse_ns_per_tile: each visited tile.
      move_ns: each token and head: permuted and brought back.
      estimate_ns: each token and head, in addition, of a pattern that reads scores.
    """

    dense_ms: float
    dense_ns_per_tile: float
    sparse_ms: float
    plan_ms: float
    sparse_ns_per_tile: float
    move_ns: float
    estimate_ns: float

    def dense(self, num_heads: int, num_tokens: int) -> float:
        """Milliseconds of a dense call of `num_heads` heads, all tokens being queries."""
        num_blocks = -(-num_tokens // 128)
        return self.dense_ms + 1e-6 * self.dense_ns_per_tile * num_heads * num_blocks * (num_blocks + 1) / 2

    def runs_dense(self, num_heads: int, num_queries: int, num_keys: int) -> bool:
        """Whether few queries over many keys run faster dense: a plan would cost more before it visits a tile."""
        tiles = num_heads * -(-num_queries // 128) * -(-num_keys // 128)
        plan = self.sparse_ms + self.plan_ms + 1e-6 * (self.move_ns + self.estimate_ns) * num_heads * num_keys
        return self.dense_ms + 1e-6 * self.dense_ns_per_tile * tiles <= plan

    def launches(self, patterns: Sequence[Pattern]) -> float:
        """Milliseconds of launches of a sparse call with these patterns, whatever its tokens."""
        return self.sparse_ms + self.plan_ms * len({pattern for pattern in patterns if pattern.reads_scores})

    def head(self, pattern: Pattern, num_tokens: int, blocks: Blocks) -> float | None:
        """Milliseconds that one head adds to a sparse call; None for a pattern without `typical_blocks`."""
        visited = pattern.typical_blocks(-(-num_tokens // blocks.kv), blocks)
        if visited is None:
            return None
        return float(self.head_of(pattern, -(-num_tokens // blocks.q) * visited, num_tokens, blocks))

    def head_of(
        self, pattern: Pattern, tiles: float | np.ndarray, num_tokens: int | np.ndarray, blocks: Blocks
    ) -> float | np.ndarray:
        """The same by the tiles that the head's plan visits: `head` estimates them."""
        tiles_of_128 = tiles * (blocks.q * blocks.kv) / (128 * 128)
        per_token = self.move_ns + self.estimate_ns * pattern.reads_scores
        return 1e-6 * (self.sparse_ns_per_tile * tiles_of_128 + per_token * num_tokens)


HOPPER = CostModel(
    dense_ms=0.03,
    dense_ns_per_tile=14.3,
    sparse_ms=0.1,
    plan_ms=0.25,
    sparse_ns_per_tile=14.0,
    move_ns=0.4,
    estimate_ns=1.1,
)
"""One H200, from the plans of bench/RESULTS.md, 2026-11-26, by least squares of relative errors over Grid at 8K to 1M
tokens, VerticalSlash at 128K and A-shape: within 8 % for Grid, 16 % for the other two. A VerticalSlash plan at 1M is
35 % slower than this says, since its diagonals lie further apart than `typical_blocks` expects.
"""


def costs_of_device() -> CostModel | None:
    """The measured cost model of the default device, looked up when called; None where nothing was measured."""
    return HOPPER if has_hopper_gpu() else None


def faster_patterns(
    patterns: Sequence[Pattern], *, num_tokens: int, blocks: Blocks, costs: CostModel | None
) -> tuple[Pattern, ...]:
    """The patterns, with `Dense()` for each that is not expected to be faster, and for all if the call is not.

    Sizes decide, never the prompt's content: the same bucket always runs the same program.

    Args:
      patterns: one for each query head.
      num_tokens: tokens of the prompt, all of them queries.
      costs: of the device; None leaves the patterns as they are.
    """
    if costs is None or all(pattern == Dense() for pattern in patterns):
        return tuple(patterns)
    dense_head = costs.head(Dense(), num_tokens, blocks) or 0.0
    chosen, total = [], 0.0
    for pattern in patterns:
        cost = costs.head(pattern, num_tokens, blocks)
        if cost is None:  # nothing is known of it, so that it is run as given
            return tuple(patterns)
        chosen.append(pattern if cost < dense_head else Dense())
        total += min(cost, dense_head)
    is_worth_it = total + costs.launches(chosen) < costs.dense(len(patterns), num_tokens)
    return tuple(chosen) if is_worth_it else (Dense(),) * len(patterns)
