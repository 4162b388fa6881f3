"""in_pieces and over_pieces: an MLP over a part of the tokens at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_same_up_to_order

from models.qwen2_5_vl import layers


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 7, 12])
def test_pieces_change_nothing_and_are_no_longer_than_they_may(rng, monkeypatch, num_tokens):
    monkeypatch.setattr(layers, "PIECE_TOKENS", 4)
    x = jnp.asarray(rng.normal(size=(2, num_tokens, 3)), jnp.float32)
    lengths = []

    def f(x):
        lengths.append(x.shape[1])
        return jnp.sin(x) + x.shape[0]

    got = layers.in_pieces(f, x)
    assert_same_up_to_order(got, np.sin(x) + 2, terms=2)
    assert set(lengths) == {{0: 0, 1: 1, 4: 4, 5: 3, 7: 4, 12: 4}[num_tokens]}


def test_a_long_prompt_never_holds_the_whole_hidden_width(monkeypatch):
    """800 numbers for each of 1,024 tokens are 3.3 MB; of 64 at a time, 0.2."""
    monkeypatch.setattr(layers, "PIECE_TOKENS", 64)
    x = jax.ShapeDtypeStruct((1, 1024, 8), jnp.float32)
    through = lambda x: jnp.sin(x @ jnp.ones((8, 800))) @ jnp.ones((800, 8))  # noqa: E731

    def temporary_bytes(f):
        memory = jax.jit(f).lower(x).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary_bytes(lambda x: layers.in_pieces(through, x)) < temporary_bytes(through) / 4
