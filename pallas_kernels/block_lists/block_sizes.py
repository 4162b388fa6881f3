"""Blocks: the tile sizes that lists are made for; here because the kernels' copy engines set them, not the patterns."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Tokens in a q block, in a kv block, and in a granule: the step in which a visited kv block may start.

    A granule of 16 tokens is what every chip's copy engine takes (TMA any row, a TPU DMA any multiple of 16 bf16 rows).
    """

    q: int = 128
    kv: int = 128
    granule: int = 16

    def __post_init__(self):
        """Raises ValueError unless all are positive and kv is a whole number of granules."""
        if min(self.q, self.kv, self.granule) < 1 or self.kv % self.granule:
            raise ValueError(f"block sizes must be positive and kv a multiple of granule: got {self}")

    def round_q(self, num_tokens: int) -> int:
        """`num_tokens` rounded up to whole q blocks."""
        return -(-num_tokens // self.q) * self.q

    def round_kv(self, num_tokens: int) -> int:
        """`num_tokens` rounded up to whole kv blocks."""
        return -(-num_tokens // self.kv) * self.kv
