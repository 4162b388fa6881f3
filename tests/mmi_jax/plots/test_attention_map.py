"""Attention maps: pixels against softmax attention written out."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import plan_of
from closeness import assert_same_up_to_order, attention_terms
from matplotlib.figure import Figure

from mmi_jax import QBoundary, TriShape
from mmi_jax.layout import concatenate, text_tokens, vision_tokens
from mmi_jax.plots.attention_map import attention_map, plot_attention


def weights_over_average(q, k, scale):
    scores = np.where(np.tril(np.ones((len(q), len(k)), bool)), q @ k.T * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) * np.arange(1, len(q) + 1)[:, None]


def test_pixels_are_mean_weights_in_any_order(rng):
    q, k = rng.normal(size=(2, 20, 8)).astype(np.float32)
    pos = np.arange(20, dtype=np.int32)
    expected = weights_over_average(q, k, 0.5)
    rows, keys = rng.permutation(20).astype(np.int32), np.append(rng.permutation(20), [-1, -1]).astype(np.int32)
    pixels = attention_map(q, k, jnp.asarray(pos), rows, keys, scale=0.5, pixels=22)
    assert_same_up_to_order(pixels[:, :20], expected[rows][:, keys[:20]], terms=attention_terms(20, 8))
    assert (pixels[:, 20:] == 0).all()
    pooled = attention_map(q, k, jnp.asarray(pos), pos, pos, scale=0.5, pixels=5)
    assert_same_up_to_order(pooled, expected.reshape(5, 4, 5, 4).mean(axis=(1, 3)), terms=16 + attention_terms(20, 8))


def test_a_plans_map_is_drawn(rng):
    layout = jax.tree.map(jnp.asarray, concatenate([text_tokens(12), vision_tokens(4, 3, 3), text_tokens(16)]))
    q, k = rng.normal(size=(2, 64, 1, 8)).astype(np.float32)
    plan = plan_of(QBoundary({1: TriShape(4, 8, 4)}), layout, q=q, k=k)
    figure = plot_attention(plan, 0, q[:, 0], k[:, 0], layout.pos, scale=0.3, title="head 0")
    assert isinstance(figure, Figure) and [axes.get_title() for axes in figure.axes][1].startswith("after")
