"""Sizes: how many tokens a prefill runs, how many at once, and how many its cache holds."""

import dataclasses
import math

from mmi_jax.engine.settings.buckets import MOST_TOKENS, Buckets
from mmi_jax.sharding import Shards
from pallas_kernels.block_lists.block_sizes import Blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tokens of one prefill.

    Args:
      held: tokens of each prompt that a cache holds before it.
      padded: tokens to run, in whole chunks.
      chunk: tokens that go through the layers at once.
      capacity: of the cache.
    """

    held: int
    padded: int
    chunk: int
    capacity: int

    @property
    def starts(self) -> range:
        """The place of each chunk's first token in the cache."""
        return range(self.held, self.held + self.padded, self.chunk)

    @property
    def is_whole(self) -> bool:
        """Whether one chunk holds all that there is."""
        return self.held == 0 and self.chunk == self.padded


def default_buckets(blocks: Blocks, shards: Shards) -> Buckets:
    """Padded lengths that every device's piece fills with whole blocks.

    A mesh takes prompts of up to `MOST_TOKENS`, as many as `mmi aot --longest` tries; one device those of `Buckets()`.
    """
    if shards.num_devices == 1:
        return Buckets()
    multiple = math.lcm(blocks.q, blocks.kv) * shards.num_devices
    return Buckets(smallest=multiple, largest=-(-MOST_TOKENS // multiple) * multiple, multiple=multiple)


def sizes_for(
    num_tokens: int, *, max_new_tokens: int, chunk_tokens: int | None, buckets: Buckets, blocks: Blocks, shards: Shards,
    held: int = 0, capacity: int = 0,
) -> Sizes:  # fmt: skip
    """The sizes of a prefill.

    Args:
      num_tokens: of the longest prompt.
      max_new_tokens: room to leave behind it.
      chunk_tokens: as for `prefill`.
      held, capacity: tokens of each prompt in a cache that is continued, and its capacity, which is kept if it does.

    Raises:
      ValueError: they do not fit each other.
    """
    padded = buckets.length_for(num_tokens)
    piece = buckets.multiple / shards.num_devices
    if piece % blocks.q or piece % blocks.kv:
        pieces = f"{shards.num_devices} times {blocks}" if shards.num_devices > 1 else f"{blocks}"
        raise ValueError(f"buckets must be whole numbers of blocks: {buckets.multiple=} must be a multiple of {pieces}")
    if shards.num_devices > 1 and (chunk_tokens is not None or held):
        raise ValueError(
            f"a mesh runs the whole prompt at once: expected no chunk_tokens, got {chunk_tokens}, and no cache, "
            f"got one of {held} tokens"
        )
    chunk = padded if chunk_tokens is None else min(chunk_tokens, padded)
    if chunk_tokens is not None and (chunk_tokens < 1 or chunk_tokens % blocks.q or chunk_tokens % blocks.kv):
        raise ValueError(f"chunk_tokens must be a positive multiple of the block sizes {blocks}, got {chunk_tokens}")
    if not 0 <= max_new_tokens <= buckets.largest - held - num_tokens:
        before = f"{held=}, " if held else ""
        raise ValueError(
            f"max_new_tokens must be at least 0 and fit the largest bucket with the prompt: "
            f"{buckets.largest=}, {before}{num_tokens=}, {max_new_tokens=}"
        )
    if shards.num_devices > 1:  # the cache is cut as the prompt is, so the room behind it runs along as padding
        chunk = padded = buckets.length_for(num_tokens + max_new_tokens)
    whole = -(-padded // chunk) * chunk
    needed = held + max(whole, num_tokens + max_new_tokens)
    if needed > capacity:
        capacity = max(held + whole, buckets.length_for(min(needed, buckets.largest)))
        capacity = -(-capacity // buckets.multiple) * buckets.multiple
    return Sizes(held=held, padded=whole, chunk=chunk, capacity=capacity)
