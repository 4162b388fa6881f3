"""Static baselines: Sparse Transformer (Child et al. 2019), fixed and strided, and Swin's 3-D shifted windows."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from mmi_jax.method.checks import check_at_least
from mmi_jax.method.kv_views import KeySet, KeyView, SortedBy, View
from mmi_jax.method.patterns.base import Family, FixedPattern, in_tokens
from mmi_jax.method.patterns.runs import all_keys_part, blocks_between, gather_rows, mean_up_to, sinks
from mmi_jax.method.patterns.streaming import window_blocks, window_part
from mmi_jax.method.query_parts import Part, QBlocks, Runs, Scope
from mmi_jax.method.token_groups import NO_GROUP, Grouping, PositionPhase, Window3D
from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.estimate.top_k import places_of

MIN_FAMILY_STRIDE = 192
"""Shortest stride in comparisons: with shorter ones the keys of all segments cost more than is saved; tokens."""


@dataclasses.dataclass(frozen=True)
class SparseTransformerStrided(FixedPattern):
    """A local window of one stride, and every key whose distance is a multiple of the stride.

    `SparseTransformerStrided(stride=2)` over 6 tokens:

        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 1 1 1 0 0
        1 0 1 1 1 0
        0 1 0 1 1 1

    Queries and keys of one phase fill whole blocks; neighbours in such a block are attended too.

    Args:
      stride: period and window; tokens per frame in the paper's baseline (Table 3).
    """

    stride: int

    family: ClassVar = Family(
        name="sf-strided", make=lambda size: SparseTransformerStrided(stride=size), min_size=MIN_FAMILY_STRIDE
    )

    @classmethod
    def example(cls) -> "SparseTransformerStrided":
        """An instance for a prompt of about a hundred tokens."""
        return cls(stride=10)

    def __post_init__(self) -> None:
        """Raises ValueError for a stride below 2."""
        check_at_least(self, stride=2)

    def views(self, key_set: KeySet, blocks: Blocks) -> tuple[View, ...]:
        """The keys sorted by position modulo the stride."""
        return (SortedBy(PositionPhase(self.stride), 0, key_set),)

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        dilated = num_kv_blocks / 2 / self.stride + 1
        return mean_up_to(window_blocks(0, self.stride, blocks) + dilated, num_kv_blocks)

    def parts(self, scope: Scope) -> list[Part]:
        """The window, and the same queries again sorted by phase."""
        blocks = scope.blocks
        view = scope.geometry.view(self.views(scope.key_set, blocks)[0])
        per_q_block = -(-scope.num_kv_blocks // self.stride) + 2
        dilated = sorted_part(
            scope, PositionPhase(self.stride), view, scope.bound(per_q_block), (self.stride, NO_LIMIT)
        )
        return [window_part(scope, 0, self.stride), dataclasses.replace(dilated, query_pass=1)]


@dataclasses.dataclass(frozen=True)
class SparseTransformerFixed(FixedPattern):
    """Attention inside each segment, and from every query to the first token of every segment.

    `SparseTransformerFixed(stride=3)` over 6 tokens:

        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 0 0 1 0 0
        1 0 0 1 1 0
        1 0 0 1 1 1

    A q block that straddles segments sees the whole of both, as far as causality lets it. Among the keys of one
    modality the first token of a segment is the first that the modality has there.

    Args:
      stride: tokens in a segment; tokens per frame in the paper's baseline (Table 3).
    """

    stride: int

    family: ClassVar = Family(
        name="sf-fixed", make=lambda size: SparseTransformerFixed(stride=size), min_size=MIN_FAMILY_STRIDE
    )

    @classmethod
    def example(cls) -> "SparseTransformerFixed":
        """An instance for a prompt of about a hundred tokens."""
        return cls(stride=10)

    def __post_init__(self) -> None:
        """Raises ValueError for a stride below 2."""
        check_at_least(self, stride=2)

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        segment = (self.stride / 2 + blocks.q) / blocks.kv + 1
        return mean_up_to(segment + num_kv_blocks / self.stride, num_kv_blocks)

    def parts(self, scope: Scope) -> list[Part]:
        """One part in prompt order; the segments' first tokens are gathered."""
        blocks, view = scope.blocks, scope.view

        def segment(q_blocks: QBlocks) -> list[Runs]:
            first = view.rank(q_blocks.min_pos // self.stride * self.stride)
            return [blocks_between(view, first, view.rank(q_blocks.max_pos + 1), blocks)]

        segment_of_row = view.pos // self.stride
        is_first = (view.order >= 0) & (segment_of_row != jnp.roll(segment_of_row, 1).at[0].set(-2))
        max_blocks = scope.bound(-(-(self.stride + blocks.q) // blocks.kv) + 2) + scope.num_kv_blocks
        gathered = gather_rows(scope, places_of(is_first, -(-len(view.order) // self.stride)))
        return [Part(member=scope.member, visits=segment, max_blocks=max_blocks, gathered=(gathered,))]


@dataclasses.dataclass(frozen=True)
class SwinWindow(FixedPattern):
    """Vision tokens see their window of frames, rows and columns and the sinks; text queries see everything.

    Args:
      frames, rows, columns: the window's extent in merged tokens.
      is_shifted: windows displaced by half their extent, as in every second Swin layer.
      sink: first keys that everyone sees, rounded up to whole kv blocks; tokens.
    """

    frames: int = 8
    rows: int = 8
    columns: int = 8
    is_shifted: bool = False
    sink: int = in_tokens(128)

    family: ClassVar = Family(
        name="swin", make=lambda size: SwinWindow(frames=size, rows=8, columns=8), min_size=1, unit=64, published=8
    )

    @classmethod
    def example(cls) -> "SwinWindow":
        """An instance for a prompt of about a hundred tokens."""
        return cls(frames=2, rows=2, columns=2, is_shifted=True, sink=4)

    def __post_init__(self):
        """Raises ValueError for an empty window."""
        check_at_least(self, frames=1, rows=1, columns=1, sink=0)

    @property
    def _grouping(self) -> Window3D:
        return Window3D(self.frames, self.rows, self.columns, self.is_shifted)

    def views(self, key_set: KeySet, blocks: Blocks) -> tuple[View, ...]:
        """The keys sorted by window."""
        return (SortedBy(self._grouping, self.sink, key_set),)

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        window = self.frames * self.rows * self.columns / blocks.kv + 1
        return mean_up_to(window + -(-self.sink // blocks.kv), num_kv_blocks)

    def parts(self, scope: Scope) -> list[Part]:
        """The vision queries sorted by window, and all others."""
        blocks = scope.blocks
        view = scope.geometry.view(self.views(scope.key_set, blocks)[0])
        q_group = scope.geometry.queries_by(self._grouping).group
        bound = scope.bound(-(-self.frames * self.rows * self.columns // blocks.kv) + 3 + -(-self.sink // blocks.kv))
        windows = sorted_part(
            scope.restrict(q_group != NO_GROUP), self._grouping, view, bound, (0, NO_LIMIT), self.sink
        )
        return [windows, all_keys_part(scope.restrict(q_group == NO_GROUP))]


def sorted_part(
    scope: Scope, grouping: Grouping, view: KeyView, max_blocks: int, interval: tuple[int, int], sink: int = 0
) -> Part:
    """Queries sorted by `grouping`, each seeing the keys of the groups in its q block, and the sinks."""
    blocks = scope.blocks
    queries = scope.geometry.queries_by(grouping)

    def visits(q_blocks: QBlocks) -> list[Runs]:
        same_groups = blocks_between(view, *view.rows_of_groups(*q_blocks.extent(queries.group)), blocks, interval)
        return [same_groups, sinks(scope.view, q_blocks, sink, blocks)]

    return Part(member=scope.member, visits=visits, max_blocks=max_blocks, order=queries.order)
