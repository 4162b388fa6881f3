"""Buckets: the few padded lengths for which programs are compiled."""

import dataclasses
import math

from mmi_jax.sharding import Shards
from pallas_kernels.block_lists.block_sizes import Blocks

MAX_TOKENS = 2**22
"""Longest prompt that a mesh takes without explicit buckets, and where `mmi aot --longest` begins; one device takes
`Buckets.largest`. `mmi aot --tokens` compiles longer ones, which need `prefill(buckets=...)` to run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """Padded lengths, at most an eighth of an octave apart: 1024, 1152, 1280, ..., 2048, 2304, ...

    Padding costs no attention work (empty lists) and at most one eighth more projection work.

    Args:
      smallest: shortest padded length, a multiple of `multiple`; tokens.
      largest: longest prompt that is accepted; tokens.
      multiple: every length is a whole number of these, the block size of the kernels; tokens.
    """

    smallest: int = 256
    largest: int = 2**20
    multiple: int = 128

    def __post_init__(self):
        """Raises ValueError unless 0 < smallest <= largest, both multiples of `multiple`."""
        is_ordered = 0 < self.multiple <= self.smallest <= self.largest
        if not is_ordered or self.smallest % self.multiple or self.largest % self.multiple:
            raise ValueError(f"buckets need 0 < smallest <= largest, both multiples of multiple: got {self}")

    def length_for(self, num_tokens: int) -> int:
        """The padded length for a prompt of `num_tokens`.

        Raises:
          ValueError: the prompt is empty or longer than the table allows.
        """
        if not 0 < num_tokens <= self.largest:
            raise ValueError(f"a prompt must have 1 to {self.largest} tokens (the largest bucket), got {num_tokens}")
        units = -(-max(num_tokens, self.smallest) // self.multiple)
        octave = 2 ** max((units - 1).bit_length() - 1, 0)  # the power of two below
        step = max(octave // 8, 1)
        return min(-(-units // step) * step * self.multiple, self.largest)

    def lengths(self) -> list[int]:
        """All padded lengths, ascending."""
        lengths = [self.length_for(self.smallest)]
        while lengths[-1] < self.largest:
            lengths.append(self.length_for(lengths[-1] + 1))
        return lengths


def default_buckets(blocks: Blocks, shards: Shards) -> Buckets:
    """Padded lengths that every device's piece fills with whole blocks.

    A mesh takes prompts of up to `MAX_TOKENS`, as many as `mmi aot --longest` tries; one device those of `Buckets()`.
    """
    if shards.num_devices == 1:
        return Buckets()
    multiple = math.lcm(blocks.q, blocks.kv) * shards.num_devices
    return Buckets(smallest=multiple, largest=-(-MAX_TOKENS // multiple) * multiple, multiple=multiple)
