"""Masked dense attention of lists, a q block at a time: the reference's mask, output and log-sum-exp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_same_up_to_order, attention_terms
from problems import random_problem

from mmi_jax.bench.checks import masked_attention
from pallas_kernels.attention import reference
from pallas_kernels.attention.inputs import AttentionInputs


@pytest.mark.parametrize("entries", [2, 512])
def test_it_is_the_reference(rng, monkeypatch, entries):
    """Also where a list is marked in several pieces."""
    monkeypatch.setattr(masked_attention, "ENTRIES", entries)
    problem = random_problem(rng)
    inputs = AttentionInputs(
        q=jnp.asarray(problem.q),
        k=jnp.asarray(problem.k),
        v=jnp.asarray(problem.v).at[:, -5:].set(jnp.nan),
        k_extra=jnp.asarray(problem.kwargs["k_extra"]),
        v_extra=jnp.asarray(problem.kwargs["v_extra"]),
        q_pos=jnp.asarray(problem.kwargs["q_pos"]),
        kv_pos=jnp.asarray(problem.kwargs["kv_pos"]),
        index=jax.tree.map(jnp.asarray, problem.index),
        scale=0.25,
    )
    blocks = [jax.jit(masked_attention.visited)(inputs, 2, i) for i in range(problem.index.num_q_blocks)]
    np.testing.assert_array_equal(np.concatenate(blocks), problem.mask()[2])
    terms = attention_terms(inputs.kv_pos.shape[-1], inputs.q.shape[-1])
    (out, lse), (want, want_lse) = jax.jit(masked_attention.attend)(inputs), reference.attend(inputs)
    assert_same_up_to_order(out, want, terms=terms)
    assert_same_up_to_order(lse, want_lse, terms=terms)
    assert np.isneginf(lse).any() and np.isfinite(lse).any()
