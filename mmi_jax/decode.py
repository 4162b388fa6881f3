"""decode: new tokens from a cache, one at a time, with dense attention."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.cache import KVCache
from mmi_jax.engine import PrefillResult, VisionLanguageModel
from pallas_kernels.notation import Array, Float, Int32


def decode(
    model: VisionLanguageModel,
    prefilled: PrefillResult,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Array | None = None,
    end_tokens: tuple[int, ...] = (),
) -> Int32[np.ndarray, "b n"]:
    """Up to `max_new_tokens` tokens after each prompt; past an end token the row repeats it.

    Args:
      prefilled: of a `prefill` with room for `max_new_tokens`.
      temperature: 0 takes the most likely token; above, samples from `softmax(logits / temperature)`.
      top_p: samples among the fewest tokens that hold this probability.
      key: a JAX random key; needed when `temperature` is above 0.
      end_tokens: decoding stops once every row has produced one of them.

    Raises:
      ValueError: `max_new_tokens` is negative or the cache has no room, `temperature` is negative, `top_p` is not in
        (0, 1], or a key is missing.
    """
    from flax import nnx  # here, so that attention and its benchmarks need no flax

    lengths = np.asarray(prefilled.cache.lengths)
    room = prefilled.cache.capacity - int(lengths.max())
    if not 0 <= max_new_tokens <= room + 1:  # the last one is not written
        raise ValueError(f"the cache must have room for {max_new_tokens=}, at least 0: it has room for {room + 1}")
    if temperature < 0 or not 0 < top_p <= 1 or (temperature > 0 and key is None):
        raise ValueError(
            f"sampling needs temperature >= 0, 0 < top_p <= 1 and a key: got {temperature=}, {top_p=}, {key=}"
        )
    graphdef, state = nnx.split(model)
    keys = jax.random.split(jax.random.key(0) if key is None else key, max(max_new_tokens, 1))
    cache = jax.tree.map(jnp.copy, prefilled.cache)  # steps write in place, and the caller's cache stays as it is
    logits, tokens = prefilled.logits, []
    is_done = np.zeros(len(lengths), bool)
    for n in range(max_new_tokens):
        token = np.asarray(_sample(logits, keys[n], temperature, top_p))
        token = np.where(is_done, tokens[-1] if tokens else token, token)
        tokens.append(token)
        is_done |= np.isin(token, end_tokens)
        if is_done.all() or n + 1 == max_new_tokens:
            break
        logits, cache = _step(graphdef, state, cache, jnp.asarray(token, jnp.int32), jnp.int32(n))
    return np.stack(tokens, axis=1).astype(np.int32) if tokens else np.zeros((len(lengths), 0), np.int32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(graphdef, state, cache: KVCache, token, n):
    """Logits after one more token, the `n`-th new one, and the cache that holds it."""
    from flax import nnx

    model: Any = nnx.merge(graphdef, state)
    layer_graphdef, layer_state = nnx.split(model.layers)
    place = cache.lengths + n
    rope_pos = jnp.broadcast_to((cache.next_rope_pos + n)[None, :, None], (3, len(token), 1))
    rotary = model.rotary(rope_pos)
    rows = jnp.arange(len(token))
    is_seen = jnp.arange(cache.capacity)[None] <= place[:, None]

    def layer(x, layer):
        state, k, v = layer

        def attend(q, k_new, v_new):
            k_all, v_all = (
                old.at[rows, place].set(new[:, 0].astype(old.dtype)) for old, new in ((k, k_new), (v, v_new))
            )
            out = jax.nn.dot_product_attention(q, k_all, v_all, mask=is_seen[:, None, None, :])
            return out, (k_all, v_all)

        return nnx.merge(layer_graphdef, state)(x, rotary, attend)

    x, (k, v) = jax.lax.scan(layer, model.embedding(token[:, None]), (layer_state, cache.k, cache.v))
    return model.unembed(x[:, 0]), dataclasses.replace(cache, k=k, v=v)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sample(logits: Float[Array, "b v"], key, temperature: float, top_p: float) -> Int32[Array, " b"]:
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits >= least, logits, -jnp.inf)).astype(jnp.int32)
