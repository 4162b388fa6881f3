"""prefill against the model's forward pass: padding, batches, chunks, tables, programs, bad input."""

import dataclasses
import functools
import json
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_same_up_to_order, model_terms
from flax import nnx

from mmi_jax import (
    AShape,
    Blocks,
    BlockTopK,
    Buckets,
    Dense,
    Grid,
    PatternTable,
    PrefillResult,
    QBoundary,
    TriShape,
    VerticalSlash,
)
from mmi_jax import prefill as run_prefill
from mmi_jax.engine.programs.compilation import num_compiled_programs
from mmi_jax.engine.programs.single_layer import run_layer, split_layers
from mmi_jax.engine.protocols import ModelConfig, Prompt, VisionLanguageModel
from mmi_jax.layout import VISION
from mmi_jax.method.dispatch import attend_sparsely
from models.testing import BLOCKS, BUCKETS, STATIC, TINY_CONFIG, batch, forward, last_logits, pad, prompt, tiny_model

TERMS = model_terms(TINY_CONFIG, num_keys=64)
"""Numbers added up for one logit of the tiny model in a bucket of 64 tokens."""

ONE = prompt(0, 9, (3, 2, 5), 17)
SEVERAL = batch(prompt(1, 4, (2, 3, 3), 6), prompt(2, 3, (1, 2, 2), 5, (3, 2, 4), 12), prompt(3, 45))
ONLINE = (
    Dense(),
    STATIC,
    VerticalSlash(vertical=4, slash=4, local=4, last_q=8),
    Grid(local=8, sink=0, tail=4, last_q=8),
)
OTHER = (
    TriShape(sink=16, local=4, last=3),
    BlockTopK(num_blocks=2),
    QBoundary({VISION: AShape(sink=0, local=5)}),
    STATIC,
)
TABLE = PatternTable(layers=(ONLINE, ONLINE, OTHER), model="tiny")


def prefill(prompt, *, model=None, **kwargs) -> PrefillResult:
    settings: dict[str, Any] = dict(buckets=BUCKETS, blocks=BLOCKS) | kwargs
    return run_prefill(model or tiny_model(), prompt, **settings)


@functools.partial(jax.jit, static_argnums=2)
def masked_forward(model: Any, prompt, layers) -> jax.Array:
    """Logits of every token by dense attention, masked in each layer to what its plan visits."""
    x, rotary = model.embed(prompt), model.rotary(prompt.rope_pos)
    graphdef, weights = split_layers(model)
    for n, patterns in enumerate(layers):

        def attend(q, k, v, patterns=patterns):
            plan = attend_sparsely(q, k, v, patterns, layout=prompt.layout, blocks=BLOCKS).plan
            mask = jax.vmap(lambda plan: plan.to_mask())(plan)
            return jax.nn.dot_product_attention(q, k, v, mask=mask), None

        x, _ = run_layer(graphdef, weights(n), x, rotary, attend)
    return model.unembed(x)


def assert_same(result, other, row=slice(None)):
    """Logits, hidden states and caches agree up to the padding; `row` of the second result."""
    assert_same_up_to_order(result.logits, other.logits[row], terms=TERMS)
    assert_same_up_to_order(result.hidden, other.hidden[row], terms=TERMS)
    np.testing.assert_array_equal(result.cache.lengths, other.cache.lengths[row])
    np.testing.assert_array_equal(result.cache.next_rope_pos, other.cache.next_rope_pos[row])
    for b, length in enumerate(np.asarray(result.cache.lengths)):
        for name in ("k", "v"):
            mine, theirs = (np.asarray(getattr(x.cache, name)) for x in (result, other))
            assert_same_up_to_order(mine[:, b, :length], theirs[:, row][:, b, :length], terms=TERMS)


def test_the_model_fits_the_protocols():
    assert isinstance(tiny_model(), VisionLanguageModel)
    assert isinstance(TINY_CONFIG, ModelConfig)
    assert isinstance(ONE, Prompt)


def test_dense_logits_equal_the_forward_pass():
    result = prefill(ONE)
    assert_same_up_to_order(result.logits, last_logits(tiny_model(), ONE), terms=TERMS)
    assert_same_up_to_order(result.report.recall, np.ones_like(result.report.recall), terms=2 * 64)


def test_a_batch_of_different_lengths_equals_the_forward_pass_and_single_runs():
    result = prefill(SEVERAL)
    assert_same_up_to_order(result.logits, last_logits(tiny_model(), SEVERAL), terms=TERMS)
    singles = (prompt(1, 4, (2, 3, 3), 6), prompt(2, 3, (1, 2, 2), 5, (3, 2, 4), 12), prompt(3, 45))
    for row, single in enumerate(singles):
        assert_same(prefill(single), result, row=slice(row, row + 1))


def test_padding_and_buckets_change_nothing():
    result = prefill(ONE)
    assert_same(result, prefill(pad(ONE, 64)))
    assert_same(result, prefill(pad(ONE, 90)))
    longer = prefill(ONE, buckets=Buckets(smallest=96, largest=256, multiple=32))
    assert longer.report.padded_tokens == 96
    assert_same(result, longer)


@pytest.mark.slow
def test_capacity_for_new_tokens_changes_no_sparse_result():
    tight, larger = (prefill(ONE, table=ONLINE[2], max_new_tokens=n) for n in (0, 30))
    assert tight.cache.capacity == 64 and larger.cache.capacity == 96
    assert_same(tight, larger)


@pytest.mark.parametrize("chunk_tokens", [None, 16])
def test_logits_are_given_at_any_token(chunk_tokens):
    """One place in each chunk, a repeated one, the first and the last."""
    at = np.array([[0, 7, 17, 29], [3, 31, 3, 32], [44, 0, 16, 15]])
    result = prefill(SEVERAL, logits_at=at, chunk_tokens=chunk_tokens)
    assert result.logits_at is not None and result.logits_at.dtype == jnp.float32
    expected = np.asarray(forward(tiny_model(), pad(SEVERAL, 64)))[np.arange(3)[:, None], at]
    assert_same_up_to_order(result.logits_at, expected, terms=TERMS)
    assert_same_up_to_order(result.logits, last_logits(tiny_model(), SEVERAL), terms=TERMS)
    assert prefill(SEVERAL).logits_at is None


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (np.array([[58]]), "must name tokens of the prompt: prompt 0 has 58, got token 58"),
        (np.array([[3, -1]]), "prompt 0 has 58, got token -1"),
        (np.array([3]), r"integers \[b, n\] with one row for each of the 1 prompts: got int64 \(1,\)"),
        (np.zeros((2, 1), int), r"one row for each of the 1 prompts: got int64 \(2, 1\)"),
        (np.zeros((1, 1)), r"got float64 \(1, 1\)"),
    ],
)
def test_logits_at_places_that_are_not_there_are_refused(at, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        prefill(ONE, logits_at=at)


@pytest.mark.parametrize("chunk_tokens", [16, 32])
def test_dense_in_chunks_equals_one_shot(chunk_tokens):
    assert_same(prefill(ONE, chunk_tokens=chunk_tokens), prefill(ONE))


@pytest.mark.slow
def test_a_static_pattern_in_chunks_equals_one_shot():
    whole, chunked = prefill(SEVERAL, table=STATIC), prefill(SEVERAL, table=STATIC, chunk_tokens=16)
    assert_same(chunked, whole)
    np.testing.assert_allclose(chunked.report.recall, whole.report.recall, atol=0.1)  # of other queries
    assert np.abs(whole.logits - prefill(SEVERAL).logits).max() > 1e-2, "the pattern must skip something"


@pytest.mark.slow
def test_several_patterns_equal_dense_attention_masked_to_their_plans():
    result = prefill(ONE, table=TABLE)
    padded = pad(ONE, 64)
    expected = masked_forward(tiny_model(), padded, TABLE.layers)[:, ONE.tokens.shape[1] - 1]
    assert_same_up_to_order(result.logits, expected, terms=TERMS)
    assert np.abs(expected - last_logits(tiny_model(), ONE)).max() > 1e-2, "the patterns must skip something"
    recall = result.report.recall
    assert (recall[:, 1] < 0.999).all() and (recall <= 1 + 1e-5).all() and (recall > 0).all()
    assert_same_up_to_order(recall[:2, 0], np.ones_like(recall[:2, 0]), terms=2 * 64)


@pytest.mark.slow
def test_one_program_serves_every_video_of_a_bucket():
    prefill(ONE, table=TABLE)
    before = num_compiled_programs()
    videos = [(5, (2, 3, 4), 9), (20, (8, 1, 2), 6, (1, 2, 2), 4), (64,), (1,)]
    results = [prefill(prompt(n, *video), table=TABLE) for n, video in enumerate(videos)]
    assert num_compiled_programs() == before
    assert [r.report.lengths[0] for r in results] == [40, 54, 64, 1]


def test_another_bucket_is_another_program():
    prefill(ONE)
    before = num_compiled_programs()
    prefill(prompt(0, 65))
    assert num_compiled_programs() == before + 1


def test_recall_that_is_not_measured_is_null():
    result = prefill(ONE, measures_recall=False)
    assert np.isnan(result.report.recall).all()
    assert json.loads(json.dumps(result.report.to_json()))["recall"] == [[None] * 4] * 3
    assert_same(result, prefill(ONE))


def poisoned(path: str, where) -> Any:
    model = nnx.clone(tiny_model())
    parameter: Any = functools.reduce(getattr, path.split("."), cast(Any, model))
    parameter[...] = parameter[...].at[where].set(jnp.nan)
    return model


@pytest.mark.parametrize(
    ("path", "where", "layer"),
    [
        ("layers.attention.q.kernel", (2, 0, 0), 2),
        ("layers.attention.k.bias", (1, 3), 1),
        ("layers.mlp.down.kernel", (0, 0, 0), 1),
        ("layers.attention.v.bias", (1, 0), 2),
    ],
)
def test_nan_is_found_and_its_layer_named(path, where, layer):
    with pytest.raises(ValueError, match=f"q and k must be finite: layer {layer} has NaN or infinity in example 0"):
        prefill(ONE, model=poisoned(path, where))


def test_nan_after_the_last_scores_is_found():
    with pytest.raises(ValueError, match="hidden states must be finite: layer 2 left NaN or infinity in example 0"):
        prefill(ONE, model=poisoned("layers.mlp.down.kernel", (2, 0, 0)))


def test_nan_in_one_example_is_named():
    token = int(next(n for n in range(36) if n in SEVERAL.tokens[2] and n not in SEVERAL.tokens[:2] and n != 7))
    with pytest.raises(ValueError, match="layer 0 has NaN or infinity in example 2"):
        prefill(SEVERAL, model=poisoned("embedding.embedding", token))


def test_nan_in_padding_is_harmless():
    model = poisoned("embedding.embedding", 36)
    padded = pad(ONE, 64)
    tokens = np.where(padded.layout.is_real, padded.tokens, 36)
    result = prefill(dataclasses.replace(padded, tokens=tokens), model=model)
    assert_same_up_to_order(result.hidden, prefill(ONE).hidden, terms=TERMS)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(buckets=Buckets(smallest=16, largest=48, multiple=16)), "1 to 48 tokens .the largest bucket., got 58"),
        (dict(max_new_tokens=199), "max_new_tokens must be at least 0 and fit.*num_tokens=58, max_new_tokens=199"),
        (dict(max_new_tokens=-1), "max_new_tokens must be at least 0.*max_new_tokens=-1"),
        (dict(chunk_tokens=20), "chunk_tokens must be a positive multiple of the block sizes.*got 20"),
        (dict(chunk_tokens=0), "chunk_tokens must be a positive multiple of the block sizes.*got 0"),
        (dict(blocks=Blocks()), "buckets must be whole numbers of blocks: buckets.multiple=16"),
        (dict(table=PatternTable(layers=((Dense(),) * 4,) * 2)), "expected 3 layers of 4 heads, got 2 layers of 4"),
        (
            dict(table=PatternTable(layers=((Dense(),) * 8,) * 3, model="other")),
            "got 3 layers of 8 heads .table for other.",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        prefill(ONE, **kwargs)


def test_prompts_that_cannot_be_run_are_refused():
    empty = dataclasses.replace(
        SEVERAL, layout=jax.tree.map(lambda x: np.where(np.arange(3)[:, None] == 1, -1, x), SEVERAL.layout)
    )
    with pytest.raises(ValueError, match=r"at least one token, got lengths \[30, 0, 45\]"):
        prefill(empty)
    left = dataclasses.replace(pad(ONE, 60), layout=jax.tree.map(lambda x: np.roll(x, 2, 1), pad(ONE, 60).layout))
    with pytest.raises(ValueError, match="padded on the right only"):
        prefill(left)
    with pytest.raises(ValueError, match=r"fit the layout \(1, 60\): got \(1, 58\) and \(3, 1, 58\)"):
        prefill(dataclasses.replace(ONE, layout=pad(ONE, 60).layout))
    single = dataclasses.replace(ONE, layout=jax.tree.map(lambda x: x[0], ONE.layout))
    with pytest.raises(ValueError, match=r"fields must be \[b, t\], got shape \(58,\)"):
        prefill(single)


def test_forward_and_prefill_agree_on_a_prompt_without_vision():
    text = prompt(9, 40)
    assert_same_up_to_order(prefill(text).logits, forward(tiny_model(), pad(text, 64))[:, 39], terms=TERMS)
