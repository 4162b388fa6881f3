"""PaddedLengths: how many tokens a prefill runs, how many at once, and how many its cache holds."""

import dataclasses

from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.engine.settings.options import PrefillOptions
from mmi_jax.sharding import Shards
from pallas_kernels.block_lists.block_sizes import Blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorCache:
    """The cache that a prefill continues.

    Args:
      tokens: of each prompt in it.
      capacity: tokens of each prompt that it can hold; the result's capacity is `PaddedLengths.capacity`.
    """

    tokens: int = 0
    capacity: int = 0


NO_CACHE = PriorCache()
"""Of a prompt that continues nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedLengths:
    """Tokens of one prefill.

    Args:
      prior_tokens: tokens of each prompt in the cache that is continued.
      padded_tokens: tokens to run, in whole chunks.
      chunk_tokens: tokens that go through the layers at once.
      capacity: of the resulting cache.
    """

    prior_tokens: int
    padded_tokens: int
    chunk_tokens: int
    capacity: int

    @property
    def starts(self) -> range:
        """The place of each chunk's first token in the cache."""
        return range(self.prior_tokens, self.prior_tokens + self.padded_tokens, self.chunk_tokens)

    @property
    def is_whole(self) -> bool:
        """Whether one chunk holds all that there is."""
        return self.prior_tokens == 0 and self.chunk_tokens == self.padded_tokens


def padded_lengths(
    num_tokens: int, options: PrefillOptions, shards: Shards, prior: PriorCache = NO_CACHE
) -> PaddedLengths:
    """The lengths of a prefill whose longest prompt has `num_tokens`; a prior cache's capacity is kept if it suffices.

    Raises:
      ValueError: they do not fit each other.
    """
    buckets, max_new_tokens = options.buckets_on(shards), options.max_new_tokens
    padded = buckets.length_for(num_tokens)
    _check_blocks(buckets, options.block_sizes, shards)
    _check_mesh(options, shards, prior)
    _check_chunk(options)
    _check_new_tokens(num_tokens, max_new_tokens, buckets, prior)
    chunk = padded if options.chunk_tokens is None else min(options.chunk_tokens, padded)
    if shards.num_devices > 1:  # the cache is split as the prompt is: its free capacity runs along as padding
        chunk = padded = buckets.length_for(num_tokens + max_new_tokens)
    whole = -(-padded // chunk) * chunk
    needed, capacity = prior.tokens + max(whole, num_tokens + max_new_tokens), prior.capacity
    if needed > capacity:
        capacity = max(prior.tokens + whole, buckets.length_for(min(needed, buckets.largest)))
        capacity = -(-capacity // buckets.multiple) * buckets.multiple
    return PaddedLengths(prior_tokens=prior.tokens, padded_tokens=whole, chunk_tokens=chunk, capacity=capacity)


def _check_blocks(buckets: Buckets, blocks: Blocks, shards: Shards) -> None:
    piece = buckets.multiple / shards.num_devices
    if piece % blocks.q or piece % blocks.kv:
        pieces = f"{shards.num_devices} times {blocks}" if shards.num_devices > 1 else f"{blocks}"
        raise ValueError(f"buckets must be whole numbers of blocks: {buckets.multiple=} must be a multiple of {pieces}")


def _check_mesh(options: PrefillOptions, shards: Shards, prior: PriorCache) -> None:
    if shards.num_devices > 1 and (options.chunk_tokens is not None or prior.tokens):
        raise ValueError(
            f"a mesh runs the whole prompt at once: expected no chunk_tokens, got {options.chunk_tokens}, and no "
            f"cache, got one of {prior.tokens} tokens"
        )


def _check_chunk(options: PrefillOptions) -> None:
    chunk_tokens, blocks = options.chunk_tokens, options.block_sizes
    if chunk_tokens is not None and (chunk_tokens < 1 or chunk_tokens % blocks.q or chunk_tokens % blocks.kv):
        raise ValueError(f"chunk_tokens must be a positive multiple of the block sizes {blocks}, got {chunk_tokens}")


def _check_new_tokens(num_tokens: int, max_new_tokens: int, buckets: Buckets, prior: PriorCache) -> None:
    if not 0 <= max_new_tokens <= buckets.largest - prior.tokens - num_tokens:
        before = f"prior_tokens={prior.tokens}, " if prior.tokens else ""
        raise ValueError(
            f"max_new_tokens must be at least 0 and fit the largest bucket with the prompt: "
            f"{buckets.largest=}, {before}{num_tokens=}, {max_new_tokens=}"
        )
