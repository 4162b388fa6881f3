"""decode: new tokens after a prefill, chosen on the device, with dense attention over the cache.

The prompt's cache is read, never written or copied: the keys of the new tokens have a separate buffer, and attention
reads both (`pallas_kernels.decode`). So one prefill serves any number of answers, and a cache of half the device's
memory can be decoded from.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.engine.decoding.decode_step import Choice, Decoding, choice_of, new_rows, replicated, run_block, start
from mmi_jax.engine.kv_cache import KVCache
from mmi_jax.engine.prefill import PrefillResult
from mmi_jax.engine.protocols import VisionLanguageModel
from mmi_jax.layout import PADDING, TEXT, TokenLayout
from pallas_kernels.decode.api import Implementation
from pallas_kernels.notation import Array, Int32

OnTokens = Callable[[np.ndarray], None]
"""Called with tokens `[b, n]` as they come; rows that have ended repeat their end token."""


def decode(
    model: VisionLanguageModel,
    prefilled: PrefillResult,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    rng: Array | None = None,
    end_tokens: tuple[int, ...] = (),
    on_tokens: OnTokens | None = None,
    implementation: Implementation | None = None,
) -> Int32[np.ndarray, "b n"]:
    """Up to `max_new_tokens` tokens after each prompt; past an end token the row repeats it.

    Args:
      prefilled: of a `prefill`; stays as it is, and needs no capacity for the new tokens.
      temperature: 0 takes the most likely token; above, samples from `softmax(logits / temperature)`.
      top_p: samples among the fewest tokens that hold this probability.
      rng: a JAX random key; needed when `temperature` is above 0.
      end_tokens: decoding stops once every row has produced one of them.
      on_tokens: called with the first token of each row, then with every block of tokens: for streaming.
      implementation: of the attention, see `decode_attention`.

    Raises:
      ValueError: `max_new_tokens` or `temperature` is negative, `top_p` is not in (0, 1], or `rng` is missing.
    """
    choice = _checked(max_new_tokens, temperature, top_p, rng, end_tokens)
    return _decode(model, prefilled, max_new_tokens, choice, rng, on_tokens, implementation)[0]


def decode_with_cache(
    model: VisionLanguageModel,
    prefilled: PrefillResult,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    rng: Array | None = None,
    end_tokens: tuple[int, ...] = (),
    on_tokens: OnTokens | None = None,
    implementation: Implementation | None = None,
) -> tuple[Int32[np.ndarray, "b n"], KVCache]:
    """The tokens of `decode`, and the cache grown by them, in the memory of `prefilled.cache`, which is donated.

    A row's cache ends with its end token, or before its last token where it has none or ended last: a token's keys are
    computed with the token after it.

    Args:
      prefilled: of a `prefill` with capacity for `max_new_tokens`; its cache must not be used afterwards.
      others: as in `decode`.

    Raises:
      ValueError: as in `decode`, or the cache lacks capacity.
    """
    choice = _checked(max_new_tokens, temperature, top_p, rng, end_tokens)
    cache = prefilled.cache
    num_free = cache.capacity - int(np.asarray(cache.lengths).max())
    if max_new_tokens > num_free + 1:  # the last one is not written
        raise ValueError(f"the cache must hold {max_new_tokens=} more: it has capacity for {num_free + 1}")
    tokens, decoding = _decode(model, prefilled, max_new_tokens, choice, rng, on_tokens, implementation)
    if decoding is None:
        return tokens, cache
    is_end = np.isin(tokens, choice.end_tokens)
    until_end = np.where(is_end.any(axis=1), is_end.argmax(axis=1) + 1, tokens.shape[1])
    num_kept = jnp.asarray(np.minimum(until_end, tokens.shape[1] - 1), jnp.int32)
    return tokens, _grown(cache, decoding.k_new, decoding.v_new, num_kept)


def _checked(
    max_new_tokens: int, temperature: float, top_p: float, rng: Array | None, end_tokens: tuple[int, ...]
) -> Choice:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens=}")
    if temperature < 0 or not 0 < top_p <= 1 or (temperature > 0 and rng is None):
        raise ValueError(
            f"sampling needs temperature >= 0, 0 < top_p <= 1 and an rng: got {temperature=}, {top_p=}, {rng=}"
        )
    return choice_of(temperature, top_p, end_tokens)


def _decode(
    model: VisionLanguageModel,
    prefilled: PrefillResult,
    max_new_tokens: int,
    choice: Choice,
    rng: Array | None,
    on_tokens: OnTokens | None,
    implementation: Implementation | None,
) -> tuple[np.ndarray, Decoding | None]:
    """All tokens, block by block, and what is on the device at the end; None for no tokens."""
    from flax import nnx  # here, so that attention and its benchmarks need no flax

    cache = prefilled.cache
    if not max_new_tokens:
        return np.zeros((len(cache.lengths), 0), np.int32), None
    sharding = replicated(cache)
    if sharding is not None and implementation is None:
        implementation = "xla"  # which the compiler can partition
    rng = jax.random.key(0) if rng is None else rng
    graphdef, state = nnx.split(model)
    decoding = start(prefilled.logits, cache, rng, choice=choice, num_rows=new_rows(max_new_tokens), sharding=sharding)
    pieces = [np.asarray(decoding.token)[:, None]]
    num_tokens = 1
    while True:
        if on_tokens is not None:
            on_tokens(pieces[-1])
        if num_tokens == max_new_tokens or np.isin(pieces[-1][:, -1], choice.end_tokens).all():
            return np.concatenate(pieces, axis=1).astype(np.int32), decoding
        decoding, tokens, n = run_block(
            graphdef,
            state,
            cache,
            decoding,
            rng,
            jnp.int32(max_new_tokens),
            choice=choice,
            implementation=implementation,
            sharding=sharding,
        )
        pieces.append(np.asarray(tokens)[:, : int(n)])
        num_tokens += int(n)


@functools.partial(jax.jit, donate_argnums=0)
def _grown(cache: KVCache, k_new, v_new, num_kept: Int32[Array, " b"]) -> KVCache:
    """The cache with the first `num_kept` new tokens of each prompt behind it, as text.

    One token at a time, in place: a scatter would first bring the whole cache into another order.
    """

    def write(n, row, old, new):
        token = jax.lax.dynamic_slice(new, (0, n, row, 0, 0), (new.shape[0], 1, 1, *new.shape[3:]))
        return jax.lax.dynamic_update_slice(old, token, (0, n, cache.lengths[n] + row, 0, 0))

    def prompt(n, kv):
        return jax.lax.fori_loop(
            0, num_kept[n], lambda row, kv: (write(n, row, kv[0], k_new), write(n, row, kv[1], v_new)), kv
        )

    k, v = jax.lax.fori_loop(0, len(num_kept), prompt, (cache.k, cache.v))
    row = jnp.arange(cache.capacity)[None] - cache.lengths[:, None]
    is_new = (row >= 0) & (row < num_kept[:, None])
    pos = jnp.max(cache.layout.pos, axis=1, keepdims=True) + 1 + row
    text = dict(modality=TEXT, video=PADDING, frame=PADDING, row=PADDING, column=PADDING, pos=pos)
    fields = {name: jnp.where(is_new, value, getattr(cache.layout, name)) for name, value in text.items()}
    return dataclasses.replace(
        cache,
        k=k,
        v=v,
        lengths=cache.lengths + num_kept,
        next_rope_pos=cache.next_rope_pos + num_kept,
        layout=TokenLayout(**fields),
    )
