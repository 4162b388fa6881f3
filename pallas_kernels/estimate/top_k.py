"""largest: which `k` of a million numbers are the largest, without sorting them where sorting is slow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.notation import Array, Bool, Float, Int32

KEY_BITS = 32
"""Of the integers that stand for float32 numbers."""

MAX_COUNTED = 512
"""Numbers of which one partial sum counts those that reach a threshold."""

GROUP = 8
"""Numbers of which only the largest is looked at first, where there are very many: an eighth is left to count."""

SIGN = np.uint32(2**31)
"""The sign bit of a float32."""

MAX_SORTED_ON_GPU = 2**16
"""Numbers up to which a sort is faster: `top_k` of 28 rows takes 0.30, 0.64 and 7.5 ms at 2^16, 2^17 and 2^20 numbers,
counting passes 0.51, 0.61 and 1.39 (H200, docs/log.md of 2026-11-26)."""


def largest(x: Float[Array, " n"], k: int) -> Bool[Array, " n"]:
    """True for the `k` largest numbers, the first among equals: what `jax.lax.top_k` returns the places of.

    On a TPU `top_k` is a sort of all of them, so there the `k`-th largest is found bit by bit instead; on a GPU among
    many numbers only: of 28 rows of 2^20 the largest 1,000 take 1.4 ms bit by bit and 7.5 by `top_k` on an H200.

    Args:
      x: float32, no NaN.
      k: from 1 to `n`.
    """
    by_few_passes = functools.partial(by_bits, bits_at_once=4)  # three launches each, whatever they count
    on_gpu = by_few_passes if len(x) > MAX_SORTED_ON_GPU else by_top_k
    return jax.lax.platform_dependent(
        x, tpu=lambda x: by_bits(x, k), cuda=lambda x: on_gpu(x, k), default=lambda x: by_top_k(x, k)
    )


def largest_places(x: Float[Array, " n"], k: int) -> Int32[Array, " k"]:
    """The places of the `k` largest numbers, ascending; the first among equals."""
    is_worth_it = len(x) % GROUP == 0 and len(x) // GROUP > max(MAX_SORTED_ON_GPU, k)
    return by_groups(x, k, GROUP) if is_worth_it else places_of(largest(x, k), k)


def by_groups(x: Float[Array, " n"], k: int, group: int) -> Int32[Array, " k"]:
    """`largest_places`, from the `k` groups of neighbours with the largest maxima: all other numbers are read once.

    A group that is not among them holds none of the largest: each of the `k` has a number before it in their order.

        x = 3 1 | 2 4 | 0 2 | 1 3, k = 2    ->    of 3 1 2 4 the largest are 3 4

    Args:
      x, k: as for `largest`.
      group: numbers of a group, a divisor of `n`; there must be `k` groups.
    """
    groups = x.reshape(-1, group)
    chosen = places_of(largest(groups.max(axis=1), k), k)
    place = places_of(largest(groups[chosen].reshape(-1), k), k)
    return chosen[place // group] * group + place % group


def places_of(is_chosen: Bool[Array, " n"], most: int) -> Int32[Array, " most"]:
    """The places of the first `most` chosen, ascending; `n` where there are fewer."""
    n = len(is_chosen)
    # A running count and one scatter, in place of a sort.
    rank = jnp.where(is_chosen, jnp.cumsum(is_chosen, dtype=jnp.int32) - 1, most)
    return jnp.full(most, n, jnp.int32).at[rank].set(jnp.arange(n, dtype=jnp.int32), mode="drop")


def by_top_k(x: Float[Array, " n"], k: int) -> Bool[Array, " n"]:
    """`largest` by `jax.lax.top_k`."""
    _, chosen = jax.lax.top_k(x, k)
    return jnp.zeros(x.shape, bool).at[chosen].set(True)


def by_bits(x: Float[Array, " n"], k: int, *, bits_at_once: int = 2) -> Bool[Array, " n"]:
    """`largest` by bisection: passes that each count the numbers at or above a few thresholds.

    The bits of a float, with all of them flipped for a negative one and the sign alone for any other, count upwards as
    the float does. The threshold gains bits from the highest down as long as `k` numbers still reach it:

        x = 3 1 3 2, k = 2    ->    threshold 3, none above it, the first 2 of those equal to it: 1 0 1 0

    Args:
      x, k: as for `largest`.
      bits_at_once: that one pass decides, by counting as many thresholds as those bits can name; a divisor of 32.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    key = jnp.where(bits >= SIGN, ~bits, bits | SIGN)
    parts = jnp.pad(key, (0, -len(x) % MAX_COUNTED)).reshape(-1, MAX_COUNTED)  # with 0, which reaches no threshold

    def gain_bits(n: Array, threshold: Array) -> Array:
        shift = (KEY_BITS - bits_at_once * (n + 1)).astype(jnp.uint32)
        higher = [threshold | (jnp.uint32(digit) << shift) for digit in range(1, 2**bits_at_once)]
        # All thresholds of a pass are counted by one reading of the numbers.
        counts = jnp.stack([jnp.sum(parts >= value, axis=1, dtype=jnp.int32) for value in higher]).sum(axis=1)
        digit = sum((count >= k).astype(jnp.uint32) for count in counts)
        return threshold | (digit << shift)

    threshold = jax.lax.fori_loop(0, KEY_BITS // bits_at_once, gain_bits, jnp.uint32(0))
    is_above, is_equal = key > threshold, key == threshold
    # Of the numbers equal to the threshold the first, as `top_k` takes them.
    num_ties = k - jnp.sum(is_above, dtype=jnp.int32)
    return is_above | (is_equal & (jnp.cumsum(is_equal, dtype=jnp.int32) <= num_ties))
