"""KVCache: empty, and as a prefill leaves it."""

import jax.numpy as jnp
import numpy as np

from mmi_jax import prefill
from mmi_jax.engine.kv_cache import empty_cache
from models.testing import BLOCKS, BUCKETS, TINY_CONFIG, batch, prompt, tiny_model


def test_an_empty_cache_holds_nothing():
    cache = empty_cache(num_layers=2, batch=3, capacity=5, num_kv_heads=2, head_dim=4, dtype=jnp.bfloat16)
    assert cache.k.shape == cache.v.shape == (2, 3, 5, 2, 4)
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16
    assert cache.capacity == 5
    assert not cache.lengths.any() and not cache.layout.is_real.any()


def test_a_prefill_leaves_keys_lengths_positions_and_layout():
    several = batch(prompt(1, 4, (2, 3, 3), 6), prompt(2, 3, (1, 2, 2), 5, (3, 2, 4), 12), prompt(3, 25))
    cache = prefill(tiny_model(), several, buckets=BUCKETS, blocks=BLOCKS).cache
    lengths = several.layout.is_real.sum(axis=1)
    assert cache.capacity == 64
    assert cache.k.shape == (TINY_CONFIG.num_layers, 3, 64, TINY_CONFIG.num_kv_heads, TINY_CONFIG.head_dim)
    np.testing.assert_array_equal(cache.lengths, lengths)
    for row, length in enumerate(lengths):
        assert cache.next_rope_pos[row] == several.rope_pos[:, row, :length].max() + 1
        np.testing.assert_array_equal(cache.layout.modality[row, :length], several.layout.modality[row, :length])
        assert (np.asarray(cache.layout.modality)[row, length:] == -1).all()
        assert (np.abs(np.asarray(cache.k)[:, row, :length]).max(axis=(2, 3)) > 0).all()
