"""Families of baselines: patterns of one kind by one size, so that every method can be run at the same cost."""

import dataclasses
from collections.abc import Callable

import numpy as np

from mmi_jax.method.patterns import (
    AShape,
    BlockTopK,
    Pattern,
    SparseTransformerFixed,
    SparseTransformerStrided,
    SwinWindow,
    TriShape,
    VerticalSlash,
)

STEPS_PER_OCTAVE = 16
"""Sizes of a ladder between one and its double: neighbours differ by 4.4 %, so that one is within 2.2 % of a cost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Patterns of one kind from small to large.

    Args:
      make: the pattern of a size.
      min_size: the smallest.
      step: sizes are multiples of it.
      unit: tokens in one step of the size, which counts tokens, blocks or frames: the largest size is the whole prompt.
      published_size: that of the paper's comparison (Table 3); None where it depends on the prompt's frames.
    """

    make: Callable[[int], Pattern]
    min_size: int
    step: int = 1
    unit: int = 1
    published_size: int | None = None

    def ladder(self, num_tokens: int) -> list[Pattern]:
        """The patterns worth trying on a prompt, cheapest first."""
        max_size = max(self.min_size, num_tokens // self.unit)
        number = int(np.log2(max_size / self.min_size) * STEPS_PER_OCTAVE) + 1
        sizes = self.min_size * 2.0 ** (np.arange(number + 1) / STEPS_PER_OCTAVE)
        rounded = sorted({max(self.min_size, round(size / self.step) * self.step) for size in sizes})
        return list(map(self.make, rounded))


FAMILIES = {
    "minference": Family(
        make=lambda size: VerticalSlash(vertical=max(128, size // 4), slash=size),
        min_size=64,
        step=16,
        published_size=4096,
    ),
    "a-shape": Family(make=lambda size: AShape(sink=128, local=size), min_size=16, step=16, published_size=4096),
    "tri-shape": Family(
        make=lambda size: TriShape(sink=128, local=size, last=128), min_size=16, step=16, published_size=4096
    ),
    "sf-fixed": Family(make=lambda size: SparseTransformerFixed(stride=size), min_size=192),
    "sf-strided": Family(make=lambda size: SparseTransformerStrided(stride=size), min_size=192),
    "swin": Family(make=lambda size: SwinWindow(frames=size, rows=8, columns=8), min_size=1, unit=64, published_size=8),
    "block-topk": Family(make=lambda size: BlockTopK(num_blocks=size), min_size=2, unit=128, published_size=50),
}
"""By the name that `mmi niah --method` takes. MInference's columns are a quarter of its diagonals (1000 and 4096).

Sparse Transformer begins at 192 tokens: with shorter strides the keys of all segments cost more than is saved.
"""


def published_pattern(name: str, tokens_per_frame: int) -> Pattern:
    """The baseline with the size of the paper's Table 3; Sparse Transformer strides are the tokens of a frame."""
    family = FAMILIES[name]
    return family.make(
        max(family.min_size, tokens_per_frame) if family.published_size is None else family.published_size
    )
