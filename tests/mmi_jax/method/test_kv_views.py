"""Key views: where groups of keys lie, and how rows are looked up in them."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import padded_left, words

from mmi_jax.layout import concatenate, text_tokens, vision_tokens
from mmi_jax.method.kv_views import AllKeys, OfModality, SortedBy, build_geometry
from mmi_jax.method.token_groups import NO_GROUP, PositionPhase, RowPlace
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import PAD_KV_POS

BLOCKS = Blocks(q=2, kv=4, granule=2)


def geometry_of(layout, *views):
    return build_geometry(layout, views, BLOCKS, num_queries=layout.num_tokens, q_start=0)


def rows(view):
    return np.asarray(view.order).tolist()


def test_views_follow_one_another_in_whole_blocks():
    vision = OfModality(1, (1,))
    geometry = geometry_of(words("t v t v v"), vision)
    assert rows(geometry.view(AllKeys())) == [0, 1, 2, 3, 4, -1, -1, -1]
    assert rows(geometry.view(vision)) == [1, 3, 4, -1, -1, -1, -1, -1]
    assert [int(geometry.view(view).offset) for view in (AllKeys(), vision)] == [0, 8]
    pos = np.asarray(geometry.kv_pos)
    assert pos.tolist() == [0, 1, 2, 3, 4, *[PAD_KV_POS] * 3, 1, 3, 4, *[PAD_KV_POS] * 5]


def test_groups_that_divide_the_keys_take_the_rows_of_one_view():
    groups = text, vision, rest = [OfModality(m, (0, 1)) for m in (0, 1, None)]
    geometry = geometry_of(words("t v v v v v t a"), *groups)
    assert [int(geometry.view(group).offset) for group in groups] == [8, 12, 20]
    assert rows(geometry)[8:] == [0, 6, -1, -1, 1, 2, 3, 4, 5, -1, -1, -1, 7, -1, -1, -1]
    assert rows(geometry.view(rest)) == [7, *[-1] * 7]
    alone = geometry_of(words("t v v v v v t a"), vision, OfModality(1, (1,)))  # of another division
    assert [int(alone.view(view).offset) for view in (vision, OfModality(1, (1,)))] == [8, 16]


def test_the_rest_is_what_no_group_lists():
    rest = OfModality(None, (1,))
    assert rows(geometry_of(words("t v a - v"), rest).view(rest))[:3] == [0, 2, -1]


def test_keys_sorted_by_column_without_the_sinks():
    layout = concatenate([text_tokens(2), vision_tokens(2, 1, 3)])
    view = SortedBy(RowPlace(), 3)  # rounded up to one block of four
    by_column = geometry_of(layout, view).view(view)
    assert rows(by_column) == [5, 6, 4, 7, -1, -1, -1, -1]
    assert np.asarray(by_column.group).tolist() == [0, 1, 2, 2, *[NO_GROUP] * 4]
    first, end = by_column.rows_of_groups(jnp.int32(2), jnp.int32(2))
    assert (int(first), int(end)) == (2, 4)
    first, end = by_column.rows_of_groups(jnp.int32(3), jnp.int32(9))
    assert first == end


@pytest.mark.parametrize("num_padding", [0, 1, 5])
def test_padding_on_the_left_is_neither_sink_nor_searched(num_padding):
    layout = padded_left(text_tokens(6), num_padding)
    view = geometry_of(layout).view(AllKeys())
    assert [int(view.rank(jnp.int32(pos))) for pos in (0, 3, 6)] == [num_padding, num_padding + 3, num_padding + 6]
    first, end = view.sink_rows(2, BLOCKS)
    assert (int(first), int(end)) == (num_padding // 4 * 4, -(-(num_padding + 2) // 4) * 4)
    assert int(view.sink_rows(0, BLOCKS)[1]) == 0


def test_queries_are_a_window_of_the_keys():
    layout = words("t v v t - -")
    geometry = build_geometry(layout, (SortedBy(PositionPhase(2), 0),), BLOCKS, num_queries=3, q_start=2)
    assert np.asarray(geometry.q_pos).tolist() == [2, 3, -1]
    queries = geometry.queries_by(PositionPhase(2))
    assert np.asarray(queries.group).tolist() == [0, 1, NO_GROUP]
    assert np.asarray(queries.order).tolist() == [0, 1, 2]
