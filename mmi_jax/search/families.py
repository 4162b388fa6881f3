"""Baselines with one size each, so that every method can be run at the same cost."""

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
      least: smallest size.
      step: sizes are multiples of it.
      unit: what the size counts: tokens, blocks or frames; `most` is the prompt's length in these.
      published: the size of the paper's comparison (Table 3); None where it depends on the prompt's frames.
    """

    make: Callable[[int], Pattern]
    least: int
    step: int
    unit: int
    published: int | None

    def ladder(self, num_tokens: int) -> list[Pattern]:
        """The patterns worth trying on a prompt, cheapest first."""
        most = max(self.least, num_tokens // self.unit)
        number = int(np.log2(most / self.least) * STEPS_PER_OCTAVE) + 1
        sizes = self.least * 2.0 ** (np.arange(number + 1) / STEPS_PER_OCTAVE)
        rounded = sorted({max(self.least, round(size / self.step) * self.step) for size in sizes})
        return list(map(self.make, rounded))


FAMILIES = {
    "minference": Family(
        make=lambda size: VerticalSlash(vertical=max(128, size // 4), slash=size), least=64, step=16, unit=1,
        published=4096,
    ),
    "a-shape": Family(make=lambda size: AShape(sink=128, local=size), least=16, step=16, unit=1, published=4096),
    "tri-shape": Family(
        make=lambda size: TriShape(sink=128, local=size, last=128), least=16, step=16, unit=1, published=4096
    ),
    "sf-fixed": Family(
        make=lambda size: SparseTransformerFixed(stride=size), least=192, step=1, unit=1, published=None,
    ),
    "sf-strided": Family(
        make=lambda size: SparseTransformerStrided(stride=size), least=192, step=1, unit=1, published=None,
    ),
    "swin": Family(make=lambda size: SwinWindow(frames=size, rows=8, columns=8), least=1, step=1, unit=64, published=8),
    "block-topk": Family(make=lambda size: BlockTopK(num_blocks=size), least=2, step=1, unit=128, published=50),
}  # fmt: skip
"""By the name that `mmi niah --method` takes. MInference's columns are a quarter of its diagonals (1000 and 4096).

Sparse Transformer begins at 192 tokens: with shorter strides the keys of all segments cost more than is saved.
"""


def published(name: str, tokens_per_frame: int) -> Pattern:
    """The baseline with the size of the paper's Table 3; Sparse Transformer strides are the tokens of a frame."""
    family = FAMILIES[name]
    return family.make(max(family.least, tokens_per_frame) if family.published is None else family.published)
