"""Key views: the orders in which a plan lays the keys out, and where each group of keys lies in them.

A view depends on the layout alone, so it is built once per prompt and shared by all heads and layers; kv heads are
copied once per view, never once per query head. View 0 is the prompt itself, always.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mmi_jax.layout import TokenLayout
from mmi_jax.method.token_groups import NO_KEY, Key
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.block_lists.integers import search
from pallas_kernels.notation import PAD_KV_POS, PAD_Q_POS, Array, Int32
from pallas_kernels.pytree import pytree


@dataclasses.dataclass(frozen=True)
class AllKeys:
    """All keys in prompt order."""

    def holds(self, layout: TokenLayout):
        """True for the tokens of this group: all but padding."""
        return layout.is_real


@dataclasses.dataclass(frozen=True)
class OfModality:
    """The keys of one modality in prompt order; `None` holds those whose modality is not in `listed`."""

    modality: int | None
    listed: tuple[int, ...]

    def holds(self, layout: TokenLayout):
        """True for the tokens of this group."""
        if self.modality is not None:
            return layout.modality == self.modality
        is_listed = jnp.isin(layout.modality, jnp.asarray(self.listed, jnp.int32))
        return layout.is_real & ~is_listed


type Group = AllKeys | OfModality


@dataclasses.dataclass(frozen=True)
class SortedBy:
    """The keys of `group` sorted by `key`, prompt order within a key, without the group's first `sink` keys."""

    key: Key
    sink: int
    group: Group = AllKeys()


type View = AllKeys | OfModality | SortedBy


@pytree
class KeyView:
    """One view of the keys, at a place of its own in the joint kv view.

    Args:
      order: token of each row, -1 for an empty row; rows of the group come first.
      pos: position of each row, never decreasing within a key, `PAD_KV_POS` for an empty row.
      key: sort key of each row, ascending; `NO_KEY` for an empty row. All 0 in a view that is not sorted by one.
      offset: first row of the view in the joint kv view.
    """

    order: Int32[Array, " s"]
    pos: Int32[Array, " s"]
    key: Int32[Array, " s"]
    offset: Int32[Array, ""]

    def rank(self, pos):
        """Rows with a position below `pos`, in a view that is not sorted by a key."""
        return search(self.pos, pos, side="left")

    def sink_rows(self, sink: int, blocks: Blocks):
        """First row of the first `sink` keys and one past their last, in whole kv blocks."""
        return _sink_rows(_first_true(self.order >= 0), sink, blocks)

    def rows_of_key(self, low, high):
        """First row of key `low` and one past the last row of key `high`; equal where no row has such a key."""
        first = search(self.key, low, side="left")
        return first, jnp.maximum(first, search(self.key, jnp.minimum(high, NO_KEY - 1), side="right"))


@pytree
class Geometry:
    """All that planning reads of a prompt apart from q and k: views of the keys, and the queries' places.

    Args:
      views: the key views by their specification; `AllKeys()` is always there and first.
      kv_pos: position of every row of the joint kv view, `PAD_KV_POS` for empty rows.
      order: token of every row of the joint kv view, -1 for empty rows.
      keys: layout of the kv tokens.
      queries: layout of the query tokens: a window of the keys' layout.
      q_keys: per sort key of the views, the queries' keys and the order that sorts the queries by it.
    """

    views: dict[str, KeyView]
    kv_pos: Int32[Array, " sx"]
    order: Int32[Array, " sx"]
    keys: TokenLayout
    queries: TokenLayout
    q_keys: dict[str, tuple[Int32[Array, " t"], Int32[Array, " t"]]]

    def view(self, view: View) -> KeyView:
        """The view that a pattern asked for in its `views`."""
        return self.views[repr(view)]

    def queries_by(self, key: Key):
        """The queries' keys, and the token order that sorts them by it."""
        return self.q_keys[repr(key)]

    @property
    def q_pos(self):
        """Position of every query token, `PAD_Q_POS` for padding; int32 [t]."""
        return jnp.where(self.queries.is_real, self.queries.pos, PAD_Q_POS)


def build_geometry(
    layout: TokenLayout, views: tuple[View, ...], blocks: Blocks, *, num_queries: int, q_start
) -> Geometry:
    """The geometry of a prompt of `s` tokens whose queries are tokens `q_start` to `q_start + num_queries`.

    Args:
      layout: one example, fields [s].
      views: what the patterns ask for; duplicates and `AllKeys()` are dropped.
      q_start: first query token, an int32 scalar, traced or not.
    """
    layout = jax.tree.map(jnp.asarray, layout)
    queries = layout.window(q_start, num_queries)
    wanted = [AllKeys(), *(view for view in dict.fromkeys(views) if view != AllKeys())]
    rows = {view: _build(view, layout, blocks) for view in wanted}
    joint, offsets = _side_by_side({view: order for view, (order, _, _) in rows.items()}, blocks)
    built = {
        repr(view): KeyView(order=order, pos=pos, key=key, offset=jnp.int32(offsets[view]))
        for view, (order, pos, key) in rows.items()
    }
    prompt = built[repr(AllKeys())]
    built[repr(AllKeys())] = dataclasses.replace(prompt, pos=_searchable(prompt.pos))
    sort_keys = dict.fromkeys(view.key for view in wanted if isinstance(view, SortedBy))
    return Geometry(
        views=built,
        kv_pos=_pos_of(joint, layout),
        order=joint,
        keys=layout,
        queries=queries,
        q_keys={repr(key): _sorted_queries(key, layout, q_start, num_queries) for key in sort_keys},
    )


def _searchable(pos):
    """Positions that never decrease, also where padding stands before or between tokens."""
    highest = jax.lax.cummax(jnp.where(pos == PAD_KV_POS, -1, pos))
    is_after_all = jnp.cumsum(pos[::-1] != PAD_KV_POS)[::-1] == 0
    return jnp.where(is_after_all, PAD_KV_POS, highest)


def _sorted_queries(key: Key, layout: TokenLayout, q_start, num_queries: int):
    keys = jax.lax.dynamic_slice_in_dim(key.of(layout), q_start, num_queries)
    return keys, jnp.argsort(keys, stable=True).astype(jnp.int32)


def _build(view: View, layout: TokenLayout, blocks: Blocks):
    """Token, position and key of each row of a view, padded to whole kv blocks."""
    num_tokens = layout.num_tokens
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    match view:
        case AllKeys():
            order, key = jnp.where(layout.is_real, tokens, -1), jnp.zeros(num_tokens, jnp.int32)
        case OfModality():
            order, key = _compact(view.holds(layout)), jnp.zeros(num_tokens, jnp.int32)
        case SortedBy():
            is_member = view.group.holds(layout)
            # Rows of the group's own view, where padding stands in the prompt only.
            is_prompt = view.group == AllKeys()
            first, row = (_first_true(is_member), tokens) if is_prompt else (jnp.int32(0), jnp.cumsum(is_member) - 1)
            is_member &= row >= _sink_rows(first, view.sink, blocks)[1]
            token_key = jnp.where(is_member, view.key.of(layout), NO_KEY)
            by_key = jnp.argsort(token_key, stable=True).astype(jnp.int32)
            key = token_key[by_key]
            order = jnp.where(key == NO_KEY, -1, by_key)
    empty = blocks.round_kv(num_tokens) - num_tokens
    order, key = jnp.pad(order, (0, empty), constant_values=-1), jnp.pad(key, (0, empty), constant_values=NO_KEY)
    return order, _pos_of(order, layout), key


def _pos_of(order, layout: TokenLayout):
    """Position of each row."""
    return jnp.where(order >= 0, layout.pos[jnp.maximum(order, 0)], PAD_KV_POS)


def _side_by_side(orders: dict[View, Array], blocks: Blocks):
    """Token of each row of the joint kv view, and the row where each view begins in it.

    Groups that divide the keys among them take the room of one view: each begins at the first whole kv block past the
    keys of the one before.
    """
    sharing: dict[View | tuple[int, ...], list[View]] = {}
    for view in orders:
        sharing.setdefault(view.listed if isinstance(view, OfModality) else view, []).append(view)
    joint, offsets, begin = [], {}, 0
    for views in sharing.values():
        length = len(orders[views[0]])
        room = length + (len(views) - 1) * blocks.kv
        order, end = jnp.full(room + length, -1, jnp.int32), 0
        for view in views:
            order = jax.lax.dynamic_update_slice_in_dim(order, orders[view], end, axis=0)
            offsets[view] = begin + end
            end += -(-jnp.sum(orders[view] >= 0, dtype=jnp.int32) // blocks.kv) * blocks.kv
        joint.append(order[:room])
        begin += room
    return jnp.concatenate(joint), offsets


def _sink_rows(first, sink: int, blocks: Blocks):
    """First and end row, in whole kv blocks, of the first `sink` rows from `first` on."""
    end = -(-(first + sink) // blocks.kv) * blocks.kv if sink else jnp.int32(0)
    return first // blocks.kv * blocks.kv, end


def _first_true(is_row):
    """The first row that holds a key: padding is no sink."""
    return jnp.argmax(is_row).astype(jnp.int32)


def _compact(is_member):
    """The members' token indices, left-packed, then -1."""
    row = jnp.where(is_member, jnp.cumsum(is_member) - 1, len(is_member))
    tokens = jnp.arange(len(is_member), dtype=jnp.int32)
    return jnp.full(len(is_member), -1, jnp.int32).at[row].set(tokens, mode="drop")
