"""Permutation: rows there and back, and passes over disjoint keys merged into one softmax."""

import jax.numpy as jnp
import numpy as np
from closeness import assert_close_to_reference, exact_attention, plain_attention

from mmi_jax.method.permutation import Permutation

EXAMPLE = Permutation(order=jnp.array([[0, 2, -1, -1, 1, 3, -1, -1]]), inverse=jnp.array([[[0, 4, 1, 5]]]))


def test_the_docstrings_example():
    x = jnp.arange(1.0, 5.0)[None, :, None]
    rows = EXAMPLE.apply(x)
    assert rows[0, [0, 1, 4, 5], 0].tolist() == [1, 3, 2, 4]
    assert EXAMPLE.undo(rows)[0, :, 0].tolist() == [1, 2, 3, 4]


def test_a_token_that_no_pass_holds_is_zero_with_lse_of_minus_infinity():
    order = Permutation(order=jnp.array([[1, -1]]), inverse=jnp.array([[[-1, 0]]]))
    out, lse = order.merge(jnp.ones((1, 2, 3)), jnp.zeros((1, 2)))
    assert out.tolist() == [[[0, 0, 0], [1, 1, 1]]] and lse.tolist() == [[-np.inf, 0]]


def test_merging_passes_is_one_softmax_over_their_keys(rng):
    """Three passes visit disjoint keys; some tokens have a row in one or two of them, one token in none."""
    t, s = 12, 30
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 8)), jnp.float32) for n in (t, s, s))
    mask = rng.random((2, t, s)) < 0.8
    mask[:, 0], mask[:, 1, 10:], mask[:, 2, :20] = False, False, False
    part = np.arange(s) // 10
    inverse = np.full((2, 3, t), -1, np.int32)
    outs, lses, orders = [], [], []
    for query_pass in range(3):
        order = rng.permutation(t).astype(np.int32)
        inverse[:, query_pass, order] = np.arange(t) + query_pass * t
        in_pass = mask & (part == query_pass)
        inverse[:, query_pass][~in_pass.any(axis=2)] = -1
        out, lse = plain_attention(q, k, v, in_pass, 0.35)
        outs.append(out[:, order])
        lses.append(jnp.where(in_pass.any(axis=2), lse, -jnp.inf)[:, order])
        orders.append(order)
    permutation = Permutation(order=jnp.tile(jnp.concatenate(orders), (2, 1)), inverse=jnp.asarray(inverse))
    out, lse = permutation.merge(jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1))
    (exact, exact_lse), (plain, plain_lse) = exact_attention(q, k, v, mask, 0.35), plain_attention(q, k, v, mask, 0.35)
    assert_close_to_reference(out, exact, plain, dtype=jnp.float32)
    assert_close_to_reference(lse, exact_lse, plain_lse, dtype=jnp.float32, what="lse")
