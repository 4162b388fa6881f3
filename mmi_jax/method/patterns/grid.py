"""Grid: evenly spaced lines and slashes, from frames and patch rows (paper section 3.1, Alg. 1)."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mmi_jax.layout import VISION
from mmi_jax.method import estimate
from mmi_jax.method.checks import check_at_least
from mmi_jax.method.kv_views import KeySet, KeyView, SortedBy, View
from mmi_jax.method.patterns.base import Pattern, in_tokens
from mmi_jax.method.patterns.runs import (
    all_keys_part,
    blocks_between,
    last_members,
    mean_up_to,
    ranges_without,
    sink_and_window,
)
from mmi_jax.method.patterns.streaming import window_blocks
from mmi_jax.method.query_parts import Part, QBlocks, Runs, Scope
from mmi_jax.method.token_groups import NO_GROUP, FramePlace, Grouping, RankPhase, RowPlace
from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Array, Bool, Int32
from pallas_kernels.pytree import pytree

MIN_STRIDE: Mapping[type[object], int] = {FramePlace: 64, RowPlace: 12}
"""Fewest tokens of a frame and of a row for which capacity is planned; with fewer a long prompt's head runs dense.

Chosen by hand.
"""

TYPICAL_STRIDE: Mapping[type[object], int] = {FramePlace: 256, RowPlace: 16}
"""Tokens of a frame and of a row that a cost model expects, chosen by hand: 16 x 16, as of 448 x 448 pixels, e.g."""


@dataclasses.dataclass(frozen=True)
class Grid(Pattern):
    """Lines through one place of every frame (or one column of every row), a local window and sinks.

    Two text tokens, three frames of two tokens, phase 0, `sink=1, local=1`; v vertical, h horizontal, s slash, o other:

        o
        o o
        h h h
        o . v o
        h h h h h
        o . v s v o
        h h h h h h h
        o . v s v s v o

    Vertical lines: all queries see the keys of the phase. Horizontal lines: the queries of the phase see all keys.
    Slashes: a token sees the same place in earlier frames. Stride and phase are estimated online from the last queries.
    Queries of the phase, and the text after the last vision token, get separate q blocks. Keys sorted by place make
    vertical lines and slashes whole kv blocks; neighbours in such a block are attended too.

    Args:
      strides: what a period may be; the best is chosen per head and prompt.
      use_hline, use_vline, use_slash: which lines are kept (Table 4).
      local: window before each query, exact to the token; tokens.
      sink: first keys that everyone sees, rounded up to whole kv blocks; tokens.
      tail: text queries after the last vision token that see everything, at most; tokens.
      last_q: queries that the estimate reads.
    """

    strides: tuple[Grouping, ...] = (FramePlace(), RowPlace())
    use_hline: bool = True
    use_vline: bool = True
    use_slash: bool = False
    local: int = in_tokens(1024)
    sink: int = in_tokens(128)
    tail: int = in_tokens(1024)
    last_q: int = 64

    @classmethod
    def example(cls) -> "Grid":
        """An instance for a prompt of about a hundred tokens."""
        return cls(use_slash=True, local=12, sink=4, tail=8, last_q=8)

    @classmethod
    def search_candidates(cls) -> tuple[Pattern, ...]:
        """Slashes, both, and vertical lines by frame, with a cheaper window than those of Table 4."""
        lines = ((False, True), (True, True), (True, False))
        frame = (FramePlace(),)
        return tuple(cls(frame, use_hline=False, use_vline=v, use_slash=s, local=256) for v, s in lines)

    def __post_init__(self):
        """Raises ValueError without a stride or a line, or for sizes out of range."""
        check_at_least(self, local=1, sink=0, tail=0, last_q=1)
        if not self.strides:
            raise ValueError("Grid.strides must name at least one stride, got none")
        if not (self.use_hline or self.use_vline or self.use_slash):
            raise ValueError("Grid needs at least one of use_hline, use_vline, use_slash")

    def views(self, key_set: KeySet, blocks: Blocks) -> tuple[View, ...]:
        """The keys sorted by each stride's place."""
        return tuple(SortedBy(grouping, self.sink, key_set) for grouping in self.strides)

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        stride = min(TYPICAL_STRIDE.get(type(grouping), getattr(grouping, "stride", 1)) for grouping in self.strides)
        line = num_kv_blocks / 2 / stride + 1  # keys of one place, half of them before a query
        visited = window_blocks(self.sink, self.local, blocks) + line * (self.use_vline + self.use_slash)
        return mean_up_to(visited, num_kv_blocks) + (num_kv_blocks / 2 / stride if self.use_hline else 0.0)

    def parts(self, scope: Scope) -> list[Part]:
        """Line queries and tail, all other queries, and, for slashes, the vision queries again, sorted by place."""
        lines = self.find_lines(scope)
        sees_all = _tail(scope, self.tail)
        if self.use_hline:
            sees_all |= (lines.q_group == lines.phase) & (lines.phase != NO_GROUP)
        parts = [self._window_and_vlines(scope.restrict(~sees_all), lines), all_keys_part(scope.restrict(sees_all))]
        if self.use_slash:
            parts.append(self._slashes(scope.restrict(~sees_all & (lines.q_group != NO_GROUP)), lines))
        return parts

    def find_lines(self, scope: Scope) -> "Lines":
        """The stride and phase on which the last queries spend most attention, and the views sorted by that stride."""
        mass, q_pos = scope.last_mass(self.last_q)
        first_pos = jnp.min(jnp.where(q_pos >= 0, q_pos, NO_LIMIT))
        is_far = scope.key_set_pos <= first_pos - self.local  # neither window nor padding
        views = [scope.geometry.view(view) for view in self.views(scope.key_set, scope.blocks)]
        is_counted = is_far & (scope.geometry.keys.modality == VISION)
        salience = estimate.salience(mass, is_counted, scope.geometry.keys)
        folds = [estimate.fold_score(salience, is_counted, view) for view in views]
        best = jnp.argmax(jnp.stack([score for score, _ in folds]))
        candidates = [
            Lines(stride=jnp.int32(n), phase=phase, view=view, q_group=queries.group, q_order=queries.order)
            for n, ((_, phase), view, queries) in enumerate(
                zip(folds, views, map(scope.geometry.queries_by, self.strides), strict=True)
            )
        ]
        return jax.tree.map(lambda *choices: jnp.stack(choices)[best], *candidates)

    def _window_and_vlines(self, scope: Scope, lines: "Lines") -> Part:
        blocks, beyond_window = scope.blocks, (self.local, NO_LIMIT)

        def visits(q_blocks: QBlocks) -> list[Runs]:
            runs = sink_and_window(scope.view, q_blocks, self.sink, self.local, blocks)
            if self.use_vline:
                first, end = (jnp.broadcast_to(row, q_blocks.min_pos.shape) for row in lines.phase_rows())
                runs.append(blocks_between(lines.view, first, end, blocks, beyond_window))
            return runs

        per_q_block = window_blocks(self.sink, self.local, blocks) + 1 + self._max_line_blocks(scope)
        return Part(member=scope.member, visits=visits, max_blocks=scope.bound(per_q_block) + scope.num_kv_blocks)

    def _slashes(self, scope: Scope, lines: "Lines") -> Part:
        blocks, beyond_window = scope.blocks, (self.local, NO_LIMIT)

        def visits(q_blocks: QBlocks) -> list[Runs]:
            first, end = lines.view.rows_of_groups(*q_blocks.extent(lines.q_group))
            whole = (first // blocks.kv, -(-end // blocks.kv))
            hole_first, hole_end = lines.phase_rows() if self.use_vline else (jnp.int32(0), jnp.int32(0))
            ranges = ranges_without(*whole, hole_first // blocks.kv, -(-hole_end // blocks.kv))
            return [blocks_between(lines.view, a * blocks.kv, b * blocks.kv, blocks, beyond_window) for a, b in ranges]

        max_blocks = scope.bound(2 * (self._max_line_blocks(scope) + 2))
        return Part(member=scope.member, visits=visits, max_blocks=max_blocks, order=lines.q_order, query_pass=1)

    def _max_line_blocks(self, scope: Scope) -> int:
        """Kv blocks that one place fills, at most."""
        tokens = [x.stride if isinstance(x, RankPhase) else MIN_STRIDE.get(type(x), 1) for x in self.strides]
        return -(-scope.num_kv_blocks // min(tokens))


@pytree
class Lines:
    """The lines of one head.

    Args:
      stride: index into `Grid.strides`.
      phase: the place that the lines run through; `NO_GROUP` when the prompt has no such place.
      view: the keys sorted by place.
      q_group, q_order: the queries' places, and the token order that sorts them.
    """

    stride: Int32[Array, ""]
    phase: Int32[Array, ""]
    view: KeyView
    q_group: Int32[Array, " t"]
    q_order: Int32[Array, " t"]

    def phase_rows(self) -> tuple[Array, Array]:
        """First row of the phase in the view and one past its last."""
        return self.view.rows_of_groups(self.phase, self.phase)


def _tail(scope: Scope, max_tokens: int) -> Bool[Array, " t"]:
    """The members after the last vision token, at most `max_tokens` of them, the last."""
    keys, queries = scope.geometry.keys, scope.geometry.queries
    last_vision_pos = jnp.max(jnp.where(keys.modality == VISION, keys.pos, -1), initial=-1)
    return last_members(scope.member & (queries.pos > last_vision_pos), max_tokens)
