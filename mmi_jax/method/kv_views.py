"""Step 2 of 9, kv views: the orders of the kv tokens that patterns need, and where each group lies in them.

A view depends on the layout alone, so it is built once per prompt and shared by all heads and layers; kv heads are
copied once per view, never once per query head. View 0 is the prompt itself, always. Five tokens and two views, by
prompt order and sorted by column, in kv blocks of 2:

    token     t v v v v
    column    - 0 1 0 1
    joint     0 1 2 3 4 -   1 3 2 4 - -      token of each row of the joint kv view
    offset    0             6
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mmi_jax.layout import TokenIndex, TokenLayout
from mmi_jax.method.token_groups import NO_GROUP, Grouping
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.integers import search
from pallas_kernels.notation import PAD_KV_POS, PAD_Q_POS, Array, Bool, Int32
from pallas_kernels.pytree import pytree, static_field


@dataclasses.dataclass(frozen=True)
class AllKeys:
    """All keys in prompt order."""

    def holds(self, layout: TokenLayout) -> Bool[Array, " t"]:
        """True for the tokens of this set: all but padding."""
        return jnp.asarray(layout.is_real)


@dataclasses.dataclass(frozen=True)
class OfModality:
    """The keys of one modality in prompt order; `None` is for those whose modality is not in `listed`."""

    modality: int | None
    listed: tuple[int, ...]

    def holds(self, layout: TokenLayout) -> Bool[Array, " t"]:
        """True for the tokens of this set."""
        if self.modality is not None:
            return jnp.asarray(layout.modality) == self.modality
        is_listed = jnp.isin(layout.modality, jnp.asarray(self.listed, jnp.int32))
        return jnp.asarray(layout.is_real) & ~is_listed


type KeySet = AllKeys | OfModality
"""The keys that some queries may see."""


@dataclasses.dataclass(frozen=True)
class SortedBy:
    """The keys of `key_set` sorted by `grouping`, prompt order within a group, without the first `sink` of them."""

    grouping: Grouping
    sink: int
    key_set: KeySet = AllKeys()


type View = AllKeys | OfModality | SortedBy


@pytree
class KeyView:
    """One view of the keys, at its offset in the joint kv view.

    Args:
      order: token of each row, -1 for an empty row; rows of the key set come first.
      pos: position of each row, never decreasing within a group, `PAD_KV_POS` for an empty row.
      group: group id of each row, ascending; `NO_GROUP` for an empty row. All 0 in a view that is not sorted by one.
      offset: first row of the view in the joint kv view.
    """

    order: Int32[Array, " s"]
    pos: Int32[Array, " s"]
    group: Int32[Array, " s"]
    offset: Int32[Array, ""]

    def rank(self, pos: Int32[Array, "*n"]) -> Int32[Array, "*n"]:
        """Rows with a position below `pos`, in a view that is not sorted by group."""
        return search(self.pos, pos, side="left")

    def sink_rows(self, sink: int, blocks: Blocks) -> tuple[Array, Array]:
        """First row of the first `sink` keys and one past their last, in whole kv blocks."""
        return _sink_rows(_first_true(self.order >= 0), sink, blocks)

    def rows_of_groups(self, low: Int32[Array, "*n"], high: Int32[Array, "*n"]) -> tuple[Array, Array]:
        """First row of group `low` and one past the last row of group `high`; equal where no row is of such a group."""
        first = search(self.group, low, side="left")
        return first, jnp.maximum(first, search(self.group, jnp.minimum(high, NO_GROUP - 1), side="right"))


@pytree
class QueryGroups:
    """The queries by one grouping: each token's group id, and the token order that sorts them by it."""

    group: Int32[Array, " t"]
    order: Int32[Array, " t"]


@pytree
class Geometry:
    """All that planning reads of a prompt apart from q and k: views of the keys, and the queries' coordinates.

    Args:
      views: the key views, in the order of `view_specs`.
      kv_pos: position of every row of the joint kv view, `PAD_KV_POS` for empty rows.
      order: token of every row of the joint kv view, -1 for empty rows.
      keys: layout of the kv tokens.
      queries: layout of the query tokens: a window of the keys' layout.
      query_groups: the queries by each grouping of the views, in the order of `groupings`.
      view_specs: what each view is; `AllKeys()` is always there and first.
      groupings: what each entry of `query_groups` groups by.
    """

    views: tuple[KeyView, ...]
    kv_pos: Int32[Array, " sx"]
    order: Int32[Array, " sx"]
    keys: TokenLayout
    queries: TokenLayout
    query_groups: tuple[QueryGroups, ...]
    view_specs: tuple[View, ...] = static_field()
    groupings: tuple[Grouping, ...] = static_field()

    def view(self, view: View) -> KeyView:
        """The view that a pattern named in its `views`."""
        return self.views[self.view_specs.index(view)]

    def queries_by(self, grouping: Grouping) -> QueryGroups:
        """The queries' groups, for a grouping of one of the views."""
        return self.query_groups[self.groupings.index(grouping)]

    @property
    def q_pos(self) -> Int32[Array, " t"]:
        """Position of every query token, `PAD_Q_POS` for padding."""
        return jnp.where(self.queries.is_real, self.queries.pos, PAD_Q_POS)


def build_geometry(
    layout: TokenLayout, views: Sequence[View], blocks: Blocks, *, num_queries: int, q_start: TokenIndex
) -> Geometry:
    """The geometry of a prompt of `s` tokens whose queries are tokens `q_start` to `q_start + num_queries`.

    Args:
      layout: one example, fields [s].
      views: those that the patterns name; duplicates and `AllKeys()` are dropped.
      q_start: first query token.
    """
    layout = jax.tree.map(jnp.asarray, layout)
    queries = layout.window(q_start, num_queries)
    specs = (AllKeys(), *(view for view in dict.fromkeys(views) if view != AllKeys()))
    rows = [_build(view, layout, blocks) for view in specs]
    joint, offsets = _side_by_side(specs, [order for order, _, _ in rows], blocks)
    built = [
        KeyView(order=order, pos=pos, group=group, offset=jnp.int32(offset))
        for (order, pos, group), offset in zip(rows, offsets, strict=True)
    ]
    built[0] = dataclasses.replace(built[0], pos=_searchable(built[0].pos))
    groupings = tuple(dict.fromkeys(view.grouping for view in specs if isinstance(view, SortedBy)))
    return Geometry(
        views=tuple(built),
        kv_pos=_pos_of(joint, layout),
        order=joint,
        keys=layout,
        queries=queries,
        query_groups=tuple(_query_groups(grouping, layout, q_start, num_queries) for grouping in groupings),
        view_specs=specs,
        groupings=groupings,
    )


def _searchable(pos: Int32[Array, " s"]) -> Int32[Array, " s"]:
    """Positions that never decrease, also where padding comes before or between tokens."""
    highest = jax.lax.cummax(jnp.where(pos == PAD_KV_POS, -1, pos))
    is_after_all = jnp.cumsum(pos[::-1] != PAD_KV_POS)[::-1] == 0
    return jnp.where(is_after_all, PAD_KV_POS, highest)


def _query_groups(grouping: Grouping, layout: TokenLayout, q_start: TokenIndex, num_queries: int) -> QueryGroups:
    group = jax.lax.dynamic_slice_in_dim(grouping.of(layout), q_start, num_queries)
    return QueryGroups(group=group, order=jnp.argsort(group, stable=True).astype(jnp.int32))


def _build(view: View, layout: TokenLayout, blocks: Blocks) -> tuple[Array, Array, Array]:
    """Token, position and group id of each row of a view, padded to whole kv blocks."""
    num_tokens = layout.num_tokens
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    match view:
        case AllKeys():
            order, group = jnp.where(layout.is_real, tokens, -1), jnp.zeros(num_tokens, jnp.int32)
        case OfModality():
            order, group = _compact(view.holds(layout)), jnp.zeros(num_tokens, jnp.int32)
        case SortedBy():
            order, group = _sorted_rows(view, layout, tokens, blocks)
    empty = blocks.round_kv(num_tokens) - num_tokens
    order, group = jnp.pad(order, (0, empty), constant_values=-1), jnp.pad(group, (0, empty), constant_values=NO_GROUP)
    return order, _pos_of(order, layout), group


def _sorted_rows(view: SortedBy, layout: TokenLayout, tokens: Array, blocks: Blocks) -> tuple[Array, Array]:
    """Token and group id of each row of a sorted view, empty rows last."""
    is_member = view.key_set.holds(layout)
    # Rows of the key set's view in prompt order; only the prompt's has padding between them.
    is_prompt = view.key_set == AllKeys()
    first, row = (_first_true(is_member), tokens) if is_prompt else (jnp.int32(0), jnp.cumsum(is_member) - 1)
    is_member &= row >= _sink_rows(first, view.sink, blocks)[1]
    token_group = jnp.where(is_member, view.grouping.of(layout), NO_GROUP)
    by_group = jnp.argsort(token_group, stable=True).astype(jnp.int32)
    group = token_group[by_group]
    return jnp.where(group == NO_GROUP, -1, by_group), group


def _pos_of(order: Int32[Array, " s"], layout: TokenLayout) -> Int32[Array, " s"]:
    """Position of each row."""
    return jnp.where(order >= 0, jnp.asarray(layout.pos)[jnp.maximum(order, 0)], PAD_KV_POS)


def _side_by_side(specs: Sequence[View], orders: Sequence[Array], blocks: Blocks) -> tuple[Array, list[Array | int]]:
    """Token of each row of the joint kv view, and the row where each view begins in it.

    Key sets that divide the keys among them take the rows of one view: each begins at the first whole kv block past
    the keys of the one before.
    """
    together: dict[View | tuple[int, ...], list[int]] = {}
    for n, view in enumerate(specs):
        together.setdefault(view.listed if isinstance(view, OfModality) else view, []).append(n)
    joint: list[Array] = []
    offsets: list[Array | int] = [0] * len(specs)
    begin = 0
    for numbers in together.values():
        length = len(orders[numbers[0]])
        num_rows = length + (len(numbers) - 1) * blocks.kv
        # A view is written in its full length, as its end is traced: the next one overwrites the empty rows. With
        # `length` more rows no write reaches past the end, where XLA would move it back over the view before.
        order, end = jnp.full(num_rows + length, -1, jnp.int32), 0
        for n in numbers:
            order = jax.lax.dynamic_update_slice_in_dim(order, orders[n], end, axis=0)
            offsets[n] = begin + end
            end += -(-jnp.sum(orders[n] >= 0, dtype=jnp.int32) // blocks.kv) * blocks.kv
        joint.append(order[:num_rows])
        begin += num_rows
    return jnp.concatenate(joint), offsets


def _sink_rows(first: Int32[Array, ""], sink: int, blocks: Blocks) -> tuple[Array, Array]:
    """First and end row, in whole kv blocks, of the first `sink` rows from `first` on."""
    end = -(-(first + sink) // blocks.kv) * blocks.kv if sink else jnp.int32(0)
    return first // blocks.kv * blocks.kv, end


def _first_true(is_row: Bool[Array, " s"]) -> Int32[Array, ""]:
    """The first row that holds a key: padding is no sink."""
    return jnp.argmax(is_row).astype(jnp.int32)


def _compact(is_member: Bool[Array, " s"]) -> Int32[Array, " s"]:
    """The members' token indices, left-packed, then -1."""
    # A scatter into a buffer of the prompt's length: XLA has no arrays whose length depends on the data.
    row = jnp.where(is_member, jnp.cumsum(is_member) - 1, len(is_member))
    tokens = jnp.arange(len(is_member), dtype=jnp.int32)
    return jnp.full(len(is_member), -1, jnp.int32).at[row].set(tokens, mode="drop")
