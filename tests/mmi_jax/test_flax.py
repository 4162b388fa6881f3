"""attention_fn inside the modules of nnx and linen, and MMIAttention."""

import doctest
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_same_up_to_order, attention_terms, reordering_error
from flax import nnx

import mmi_jax.flax
from mmi_jax import AShape, Blocks, Dense, TriShape, VerticalSlash
from mmi_jax.flax import MMIAttention, attention_fn
from mmi_jax.layout import TokenLayout, concatenate, stack, text_tokens, vision_tokens
from mmi_jax.method.dispatch import attend_sparsely

BLOCKS = Blocks(q=16, kv=16, granule=16)
NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, WIDTH = 50, 4, 2, 16
LAYOUT = concatenate([text_tokens(6), vision_tokens(4, 2, 5), text_tokens(4)])
CAUSAL: Any = np.tril(np.ones((1, 1, NUM_TOKENS, NUM_TOKENS), bool))
SPARSE = (
    AShape(sink=0, local=7),
    TriShape(sink=16, local=3, last=2),
    VerticalSlash(vertical=4, slash=2, local=1),
    Dense(),
)
TERMS = 2 * WIDTH + attention_terms(NUM_TOKENS, WIDTH // NUM_HEADS)
"""Numbers added up for one output of a module: two projections and attention."""
DENSE = attention_fn(Dense(), blocks=BLOCKS)
MIXED = attention_fn(SPARSE, layout=LAYOUT, blocks=BLOCKS)


@pytest.fixture
def x(rng) -> jax.Array:
    return jnp.asarray(rng.normal(size=(2, NUM_TOKENS, WIDTH)), jnp.float32)


def nnx_module(fn=nnx.dot_product_attention, **kwargs) -> nnx.MultiHeadAttention:
    fields: dict[str, Any] = dict(num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, in_features=WIDTH, decode=False)
    return nnx.MultiHeadAttention(**fields | kwargs, attention_fn=fn, rngs=nnx.Rngs(0))


def linen_module(fn=nn.dot_product_attention, **kwargs) -> Any:
    return nn.MultiHeadDotProductAttention(num_heads=NUM_HEADS, attention_fn=fn, **kwargs)


def causal_mask(t: int, s: int) -> Any:
    return np.tril(np.ones((1, 1, t, s), bool), s - t)


@nnx.jit
def run(layer, x, **kwargs) -> jax.Array:
    return layer(x, **kwargs)


@functools.partial(jax.jit, static_argnums=3)
def masks(q, k, v, patterns, layout) -> jax.Array:
    """What the heads attend, `[b, h, t, s]`."""
    plan = attend_sparsely(q, k, v, patterns, layout=layout, blocks=BLOCKS).plan
    return jax.vmap(lambda plan: plan.to_mask())(plan)


# Equality with the stock modules.


def test_dense_in_nnx_equals_the_stock_module_with_a_causal_mask(x):
    expected = nnx_module()(x, mask=CAUSAL)
    assert_same_up_to_order(run(nnx_module(DENSE), x), expected, terms=TERMS)


def test_dense_in_linen_equals_the_stock_module_with_a_causal_mask(x):
    variables = linen_module().init(jax.random.key(1), x)
    expected = linen_module().apply(variables, x, mask=CAUSAL)
    assert_same_up_to_order(jax.jit(linen_module(DENSE).apply)(variables, x), expected, terms=TERMS)


def test_sparse_in_nnx_equals_masked_dense(x):
    stock = nnx_module()
    mask = masks(stock.query(x), stock.key(x), stock.value(x), SPARSE, LAYOUT)
    assert (mask.sum(axis=(0, 2, 3))[:3] < mask[:, 3].sum()).all(), "the patterns must skip something"
    assert_same_up_to_order(run(nnx_module(MIXED), x), stock(x, mask=mask), terms=TERMS)


def test_sparse_in_linen_equals_masked_dense(x):
    variables = linen_module().init(jax.random.key(1), x)
    weights = variables["params"]
    q, k, v = (
        jnp.einsum("bte,ehd->bthd", x, weights[name]["kernel"]) + weights[name]["bias"][None, None]
        for name in ("query", "key", "value")
    )
    expected = linen_module().apply(variables, x, mask=masks(q, k, v, SPARSE, LAYOUT))
    assert_same_up_to_order(jax.jit(linen_module(MIXED).apply)(variables, x), expected, terms=TERMS)


def test_outside_jit(x):
    expected = nnx_module()(x, mask=CAUSAL)
    assert_same_up_to_order(nnx_module(DENSE)(x), expected, terms=TERMS)


def test_queries_are_the_last_tokens_of_longer_keys(x):
    expected = nnx_module()(x[:, -9:], x, mask=causal_mask(9, NUM_TOKENS))
    layer, mask = nnx_module(DENSE), causal_mask(9, NUM_TOKENS)
    assert_same_up_to_order(jax.jit(lambda x: layer(x[:, -9:], x, mask=mask))(x), expected, terms=TERMS)


def test_any_number_of_batch_axes(x):
    expected = nnx_module()(x, mask=CAUSAL)
    assert_same_up_to_order(run(nnx_module(DENSE), x[None, :, None])[0, :, 0], expected, terms=TERMS)
    assert_same_up_to_order(run(nnx_module(DENSE), x[0]), expected[0], terms=TERMS)


def test_dtype_of_the_module_is_the_dtype_of_attention():
    wide, narrow = (jax.ShapeDtypeStruct((1, 20, 4, 8), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert jax.eval_shape(functools.partial(DENSE, dtype=jnp.bfloat16), wide, wide, wide).dtype == jnp.bfloat16
    assert jax.eval_shape(DENSE, narrow, wide, wide).dtype == jnp.float32
    assert jax.eval_shape(DENSE, narrow, narrow, narrow).dtype == jnp.bfloat16


def test_gradients_equal_those_of_the_stock_module(x):
    @nnx.jit
    @nnx.grad
    def gradients(layer):
        return (layer(x, mask=CAUSAL) ** 2).sum()

    expected = jax.tree_util.tree_leaves_with_path(gradients(nnx_module()))
    largest = max(np.abs(leaf).max() for _, leaf in expected)
    for (path, other), leaf in zip(expected, jax.tree.leaves(gradients(nnx_module(DENSE))), strict=True):
        allowed = reordering_error(largest, terms=2 * NUM_TOKENS * TERMS)
        np.testing.assert_allclose(leaf, other, rtol=0, atol=allowed, err_msg=jax.tree_util.keystr(path))


# What is accepted and what is refused.


def test_a_mask_that_says_what_the_layout_says_is_accepted(x):
    layouts = stack([text_tokens(NUM_TOKENS), text_tokens(NUM_TOKENS - 20)])
    is_real: Any = np.asarray(layouts.is_real)[:, None, None, :]
    layer = nnx_module(attention_fn(Dense(), layout=layouts, blocks=BLOCKS))
    expected = run(layer, x)
    same: Any = np.asarray(nnx.make_causal_mask(x[..., 0]))
    for mask in (CAUSAL, CAUSAL & is_real, same):
        assert_same_up_to_order(jax.jit(lambda x, mask=mask: layer(x, mask=mask))(x), expected, terms=TERMS)
    real_rows = np.asarray(layouts.is_real)
    assert_same_up_to_order(expected[real_rows], nnx_module()(x, mask=CAUSAL & is_real)[real_rows], terms=TERMS)


def test_is_causal_is_accepted(x):
    layer = nnx_module(DENSE)
    assert_same_up_to_order(jax.jit(lambda x: layer(x, is_causal=True))(x), run(layer, x), terms=TERMS)


@pytest.mark.parametrize(
    "mask",
    [
        np.ones((1, 1, NUM_TOKENS, NUM_TOKENS), bool),
        np.ones((1, 1, 1, NUM_TOKENS), bool),
        CAUSAL & (np.arange(NUM_TOKENS) != 3),
    ],
)
def test_another_mask_is_refused(x, mask):
    with pytest.raises(ValueError, match="a mask must be the causal one of the layout"):
        nnx_module(DENSE)(x, mask=mask)
    with pytest.raises(ValueError, match="a mask must be the causal one of the layout"):
        linen_module(DENSE).init(jax.random.key(0), x, mask=mask)


def test_a_mask_that_does_not_fit_is_refused(x):
    with pytest.raises(ValueError, match="a mask must broadcast to"):
        nnx_module(DENSE)(x, mask=causal_mask(NUM_TOKENS, NUM_TOKENS + 1))


def test_a_traced_mask_is_refused(x):
    layer = nnx_module(DENSE)
    with pytest.raises(NotImplementedError, match="a traced mask cannot be compared"):
        jax.jit(lambda x, mask: layer(x, mask=mask))(x, CAUSAL)


def test_decode_mode_is_refused_by_both(x):
    layer = nnx_module(DENSE, decode=True)
    layer.init_cache(x.shape)
    with pytest.raises(NotImplementedError, match="in decode mode"):
        layer(x[:, :1])
    stepping = linen_module(DENSE, decode=True)
    variables = stepping.init(jax.random.key(0), x)
    with pytest.raises(NotImplementedError, match="in decode mode"):
        stepping.apply(variables, x[:, :1], mutable="cache")


def test_dropout_is_refused_unless_deterministic(x):
    layer = nnx_module(DENSE, dropout_rate=0.5, deterministic=False)
    with pytest.raises(NotImplementedError, match="no dropout.*dropout_rate=0.5"):
        layer(x)
    np.testing.assert_array_equal(
        nnx.jit(lambda layer, x: layer(x, deterministic=True))(layer, x), run(nnx_module(DENSE), x)
    )
    with pytest.raises(NotImplementedError, match="no dropout.*dropout_rate=0.5"):
        linen_module(DENSE, dropout_rate=0.5, deterministic=False).init(jax.random.key(0), x)


def test_sown_weights_are_refused_by_both(x):
    with pytest.raises(NotImplementedError, match="cannot honour module"):
        nnx_module(DENSE)(x, sow_weights=True)
    with pytest.raises(NotImplementedError, match="cannot honour module"):
        linen_module(DENSE).init(jax.random.key(0), x, sow_weights=True)


def test_precision_is_refused_by_both(x):
    with pytest.raises(NotImplementedError, match="cannot honour precision"):
        nnx_module(DENSE, precision="highest")(x)
    with pytest.raises(NotImplementedError, match="cannot honour precision"):
        linen_module(DENSE, precision=jax.lax.Precision.HIGHEST).init(jax.random.key(0), x)
    np.testing.assert_array_equal(run(nnx_module(DENSE, precision="default"), x), run(nnx_module(DENSE), x))


def test_einsums_of_linen_are_refused(x):
    layer = linen_module(
        DENSE,
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    with pytest.raises(NotImplementedError, match="cannot honour qk_attn_weights_einsum"):
        layer.init(jax.random.key(0), x)


@pytest.mark.parametrize("name", ["bias", "einsum_dot_general", "attn_weights_value_einsum", "input_positions"])
def test_other_arguments_are_refused(name):
    q = jnp.ones((1, 20, 4, 8))
    with pytest.raises(NotImplementedError, match=f"cannot honour {name}"):
        DENSE(q, q, q, **{name: jnp.zeros((1, 4, 20, 20))})


def test_input_positions_of_nnx_are_refused(x):
    with pytest.raises(NotImplementedError, match="cannot honour input_positions"):
        nnx_module(DENSE)(x, input_positions=jnp.arange(NUM_TOKENS))


def test_is_causal_over_longer_keys_is_refused(x):
    with pytest.raises(NotImplementedError, match="as many queries as keys only, got 9 and 50"):
        nnx_module(DENSE)(x[:, -9:], x, is_causal=True)


# MMIAttention.


def test_the_example_of_the_docstring_runs():
    results = doctest.testmod(mmi_jax.flax)
    assert results.attempted >= 8 and not results.failed


def stretched(x, rotary):
    return x * rotary[None, :, None, None]


def test_module_equals_masked_dense_with_grouped_queries_and_rope(x):
    layer = MMIAttention(
        SPARSE, in_features=WIDTH, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=8, use_bias=True,
        rope=stretched, blocks=BLOCKS, rngs=nnx.Rngs(3),
    )  # fmt: skip
    rotary = jnp.linspace(1, 3, NUM_TOKENS)
    q, k = (stretched(p(x).reshape(2, NUM_TOKENS, -1, 8), rotary) for p in (layer.q, layer.k))
    v = layer.v(x).reshape(2, NUM_TOKENS, -1, 8)
    dense = jax.nn.dot_product_attention(q, k, v, mask=masks(q, k, v, SPARSE, LAYOUT))
    expected = layer.out(dense.reshape(2, NUM_TOKENS, -1))
    assert_same_up_to_order(run(layer, x, layout=LAYOUT, rotary=rotary), expected, terms=TERMS)


def test_module_compiles_once_for_all_layouts_of_a_length(x):
    layer = MMIAttention(AShape(sink=0, local=5), in_features=WIDTH, num_heads=2, blocks=BLOCKS, rngs=nnx.Rngs(0))
    traces = []

    @nnx.jit
    def counted(layer, x, layout: TokenLayout):
        traces.append(1)
        return layer(x, layout=layout)

    text, padded = text_tokens(NUM_TOKENS), text_tokens(NUM_TOKENS - 3).pad_to(NUM_TOKENS)
    mixed = counted(layer, x, LAYOUT)
    np.testing.assert_array_equal(counted(layer, x, text), mixed)  # an A-shape does not read modalities
    np.testing.assert_array_equal(counted(layer, x, padded)[:, :-3], mixed[:, :-3])
    np.testing.assert_array_equal(counted(layer, x, padded)[:, -3:], 0)
    assert len(traces) == 1


@pytest.mark.slow
def test_every_parameter_of_the_module_gets_a_gradient(x):
    layer = MMIAttention(SPARSE, in_features=WIDTH, num_heads=4, use_bias=True, blocks=BLOCKS, rngs=nnx.Rngs(0))
    gradients = nnx.jit(nnx.grad(lambda layer: (layer(x, layout=LAYOUT) ** 2).sum()))(layer)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    assert len(leaves) == 8
    for path, leaf in leaves.items():
        # A bias of the keys moves all scores of a query alike: its gradient is zero.
        assert np.isfinite(leaf).all() and (np.abs(leaf).max() > 1e-3 or "'k'" in path), path


def test_dtypes_of_the_module():
    layer = MMIAttention(Dense(), in_features=WIDTH, num_heads=4, dtype=jnp.bfloat16, blocks=BLOCKS, rngs=nnx.Rngs(0))
    assert layer.q.kernel.dtype == jnp.float32
    out = nnx.eval_shape(lambda: layer(jnp.ones((1, NUM_TOKENS, WIDTH)), layout=LAYOUT))
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_kv_heads=3), "num_q_heads=4 must be a positive multiple of num_kv_heads=3"),
        (dict(num_kv_heads=0), "num_q_heads=4 must be a positive multiple of num_kv_heads=0"),
        (dict(in_features=18), "in_features=18 must be a multiple of num_heads=4"),
        (dict(patterns=SPARSE[:3]), "one pattern for each of the 4 query heads, got 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    fields = dict(patterns=Dense(), in_features=WIDTH, num_heads=4) | fields
    with pytest.raises(ValueError, match=message):
        MMIAttention(**fields, rngs=nnx.Rngs(0))


def test_rotary_and_rope_come_together(x):
    plain = MMIAttention(Dense(), in_features=WIDTH, num_heads=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="if and only if there is a rope"):
        plain(x, layout=LAYOUT, rotary=jnp.ones(NUM_TOKENS))
    turned = MMIAttention(Dense(), in_features=WIDTH, num_heads=4, rope=stretched, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="if and only if there is a rope"):
        turned(x, layout=LAYOUT)
