"""Estimates: last queries, their attention, its mass by diagonal, and what stands out of a frame."""

import jax.numpy as jnp
import numpy as np
from cases import words
from closeness import assert_same_up_to_order, attention_terms

from mmi_jax.layout import concatenate, text_tokens, vision_tokens
from mmi_jax.method.estimate import fold_score, last_queries, salience
from mmi_jax.method.kv_views import SortedBy, build_geometry
from mmi_jax.method.token_groups import NO_GROUP, RowPlace
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.estimate.xla import attention_rows, diagonal_mass


def test_last_queries_are_the_last_members_at_any_place():
    member = jnp.array([True, False, True, True, False])
    assert sorted(np.asarray(last_queries(member, 2)).tolist()) == [2, 3]
    assert sorted(np.asarray(last_queries(member, 5)).tolist()) == [-1, -1, 0, 2, 3]


def test_attention_rows_are_a_softmax_over_what_each_query_sees(rng):
    q, k = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 4), (5, 4)))
    q_pos, kv_pos = jnp.array([-1, 2, 4]), jnp.arange(5)
    got = np.asarray(attention_rows(q, k, q_pos, kv_pos, 0.5), np.float64)
    scores = np.exp(np.asarray(q, np.float64) @ np.asarray(k, np.float64).T * 0.5)
    scores *= np.asarray(kv_pos)[None] <= np.asarray(q_pos)[:, None]
    expected = scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-300)
    assert_same_up_to_order(got, expected, terms=attention_terms(5, 4))
    assert not got[0].any()


def test_attention_rows_do_not_read_keys_that_no_query_sees():
    k = jnp.array([[1.0], [jnp.nan]])
    assert np.asarray(attention_rows(jnp.ones((1, 1)), k, jnp.array([0]), jnp.array([0, 1]), 1.0)).tolist() == [[1, 0]]


def test_diagonal_mass_counts_distance_from_each_anchor():
    weights = jnp.array([[0.0, 1, 2, 4, 8, 16], [32, 64, 128, 256, 0, 0], [9, 9, 9, 9, 9, 9]])
    anchor = jnp.array([5, 3, -1])
    by_distance = [16 + 256, 8 + 128, 4 + 64, 2 + 32, 1, 0]
    assert np.asarray(diagonal_mass(weights, anchor, 1))[:6].tolist() == by_distance
    # Bands of 2 hold distances 2n - 1 and 2n.
    assert np.asarray(diagonal_mass(weights, anchor, 2)).tolist() == [272, 136 + 68, 34 + 1, 0]


VIDEO = concatenate([text_tokens(1), vision_tokens(4, 2, 3)])


def test_a_frame_that_is_attended_as_a_whole_does_not_stand_out():
    mass = jnp.where(VIDEO.frame == 2, 1.0, 0.01)
    counted = jnp.asarray(VIDEO.frame >= 0)
    np.testing.assert_allclose(np.asarray(salience(mass, counted, VIDEO)), 0, atol=1e-6)


def test_one_heavy_token_counts_no_more_than_one_of_a_line():
    on_line = jnp.asarray(VIDEO.column == 1)
    mass = jnp.where(on_line, 0.05, 0.001).at[3].set(1e6)  # token 3: column 2
    counted = jnp.asarray(VIDEO.frame >= 0)
    view = SortedBy(RowPlace(), 0)
    geometry = build_geometry(VIDEO, (view,), Blocks(q=1, kv=1, granule=1), num_queries=25, q_start=0)
    score, group = fold_score(salience(mass, counted, VIDEO), counted, geometry.view(view))
    assert int(group) == 1 and float(score) > 0


def test_without_a_token_to_look_at_there_is_no_score():
    layout = words("t t t")
    view = SortedBy(RowPlace(), 0)
    geometry = build_geometry(layout, (view,), Blocks(q=1, kv=1, granule=1), num_queries=3, q_start=0)
    counted = jnp.zeros(3, bool)
    score, group = fold_score(salience(jnp.ones(3), counted, layout), counted, geometry.view(view))
    assert float(score) == -np.inf and int(group) == NO_GROUP
