"""The vendor's dense path: prompts whose positions equal indices, and dense attention without a plan."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_same_up_to_order, attention_terms, model_terms

from mmi_jax.engine import prefill
from mmi_jax.engine.programs import compilation
from mmi_jax.engine.programs.program_cache import ProgramCache
from mmi_jax.engine.settings import request
from mmi_jax.layout import PADDING, concatenate, stack, text_tokens, vision_tokens
from mmi_jax.method import dispatch
from mmi_jax.method.dispatch import attend_densely, attend_sparsely, position_equals_index
from mmi_jax.method.patterns import AShape, Dense
from mmi_jax.method.tables.cost_model import CostModel
from models.testing import BLOCKS, BUCKETS, TINY_CONFIG, prompt, tiny_model

PROMPT = concatenate([text_tokens(5), vision_tokens(2, 3, 4), text_tokens(11)])


def moved(**changes):
    """The prompt with one token's field changed."""
    layout = PROMPT
    for name, (token, value) in changes.items():
        field = np.array(getattr(layout, name))
        field[token] = value
        layout = dataclasses.replace(layout, **{name: field})
    return layout


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (PROMPT, True),
        (PROMPT.pad_to(48), True),
        (stack([PROMPT, text_tokens(3)]), True),
        (moved(pos=(6, 7)), False),  # two tokens have one position and see each other
        (moved(modality=(0, PADDING)), False),  # padding before a token
    ],
    ids=["prompt", "padded", "batch", "shared position", "padding first"],
)
def test_positions_equal_indices_iff_all_differ_and_padding_is_last(layout, expected):
    assert position_equals_index(layout) is expected


def test_a_traced_layout_hides_its_positions():
    seen = []
    jax.jit(lambda layout: seen.append(position_equals_index(layout)))(jax.tree.map(jnp.asarray, PROMPT))
    assert seen == [False]


def inputs(rng, layout, num_keys):
    """q, k, v of a batch, NaN at padding and in keys past the prompt."""
    num_tokens = layout.num_tokens
    sizes = ((num_tokens, 4), (num_keys, 2), (num_keys, 2))
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, h, 64)), jnp.float32) for n, h in sizes)
    is_real = jnp.pad(jnp.asarray(layout.is_real), ((0, 0), (0, num_keys - num_tokens)))[..., None, None]
    return q, *(jnp.where(is_real, x, jnp.nan) for x in (k, v))


def test_dense_attention_without_a_plan_equals_the_dense_plan(rng):
    layout = stack([PROMPT.pad_to(48), text_tokens(48)])
    q, k, v = inputs(rng, layout, 64)
    got, lse = attend_densely(q, k, v, layout=layout, scale=0.125, implementation="xla")
    planned = attend_sparsely(q, k[:, :48], v[:, :48], Dense(), layout=layout, scale=0.125, implementation="xla")
    assert_same_up_to_order(got, planned.out, terms=attention_terms(48, 64))
    assert_same_up_to_order(lse, planned.lse, terms=attention_terms(48, 64))
    assert not np.asarray(got[0, PROMPT.num_tokens :]).any()


def test_finite_padding_is_left_alone_and_changes_no_prompt(rng):
    layout = stack([PROMPT.pad_to(48), text_tokens(48)])
    q, k, v = (jnp.nan_to_num(x, nan=100.0) for x in inputs(rng, layout, 48))
    attend = functools.partial(attend_densely, q, k, v, layout=layout, scale=0.125, implementation="xla")
    (got, lse), (want, want_lse) = (attend(padding_is_finite=is_finite) for is_finite in (True, False))
    is_real = np.asarray(layout.is_real)
    np.testing.assert_array_equal(np.asarray(got)[is_real], np.asarray(want)[is_real])
    np.testing.assert_array_equal(lse, want_lse)
    assert np.isfinite(got).all()


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """A device on which the vendor's kernel takes every dense call: the number of calls it took."""
    calls = []

    def attend(q, k, v, **options: Any):
        calls.append(q.shape)
        options["implementation"] = "xla"
        return attend_densely(q, k, v, **options)

    monkeypatch.setattr(dispatch, "cudnn_takes", lambda q: True)
    monkeypatch.setattr(dispatch, "attend_densely", attend)
    return calls


def test_dense_heads_of_positions_that_equal_indices_need_no_plan(rng, cudnn_by_xla):
    layout = PROMPT.pad_to(48)
    q, k, v = inputs(rng, stack([layout, layout]), 48)
    result = attend_sparsely(q, k, v, Dense(), layout=layout)
    assert result.plan is None
    assert result.density().tolist() == [[1.0] * 4] * 2
    planned = attend_sparsely(q, k, v, Dense(), layout=layout, implementation="xla")
    assert planned.plan is not None
    assert_same_up_to_order(result.out, planned.out, terms=attention_terms(48, 64))


@pytest.mark.parametrize("layout", [moved(pos=(6, 7)), PROMPT], ids=["shared position", "one head sparse"])
def test_everything_else_is_planned(rng, cudnn_by_xla, layout):
    patterns = [Dense()] * 4 if layout is not PROMPT else [Dense()] * 3 + [AShape(sink=8, local=8)]
    q, k, v = inputs(rng, stack([layout, layout]), layout.num_tokens)
    assert attend_sparsely(q, k, v, patterns, layout=layout).plan is not None
    assert not cudnn_by_xla


DENSE_IS_FREE = CostModel(
    dense_ms=0.0, dense_ns_per_tile=0.0, sparse_ms=1.0, plan_ms=1.0, sparse_ns_per_tile=1.0, move_ns=1.0,
    estimate_ns=1.0,
)  # fmt: skip


def test_prefill_runs_dense_where_the_device_is_faster_so(monkeypatch, cudnn_by_xla):
    run = functools.partial(prefill.prefill, tiny_model(), prompt(0, 9, (3, 2, 5), 17), buckets=BUCKETS, blocks=BLOCKS)
    expected = run(table=Dense(), implementation="xla")
    monkeypatch.setattr(request, "costs_of_device", lambda: DENSE_IS_FREE)
    monkeypatch.setattr(compilation, "PROGRAMS", ProgramCache())  # programs of other tests know nothing of this kernel
    got = run(table=AShape(sink=1, local=2))
    assert cudnn_by_xla, "dense layers went to the vendor's kernel"
    assert (got.report.density == 1).all() and (got.report.recall == 1).all()
    assert_same_up_to_order(got.logits, expected.logits, terms=model_terms(TINY_CONFIG, num_keys=64))
    sparse = run(table=AShape(sink=1, local=2), may_run_dense=False)
    assert np.abs(np.asarray(sparse.logits - expected.logits)).max() > 1e-3
