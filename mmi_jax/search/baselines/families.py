"""Families of baselines: patterns of one kind by one size, so that every method can be run at the same cost."""

import numpy as np

from mmi_jax.method.patterns import PATTERNS, Pattern
from mmi_jax.method.patterns.base import Family

STEPS_PER_OCTAVE = 16
"""Sizes of a ladder between one and its double: neighbours differ by 4.4 %, so that one is within 2.2 % of a cost."""

FAMILIES: dict[str, Family] = {cls.family.name: cls.family for cls in PATTERNS if cls.family is not None}
"""By the name that `mmi niah --method` takes."""


def ladder_of(name: str, num_tokens: int) -> list[Pattern]:
    """The patterns of a family that are worth trying on a prompt, cheapest first."""
    family = FAMILIES[name]
    max_size = max(family.min_size, num_tokens // family.unit)
    number = int(np.log2(max_size / family.min_size) * STEPS_PER_OCTAVE) + 1
    sizes = family.min_size * 2.0 ** (np.arange(number + 1) / STEPS_PER_OCTAVE)
    return list(map(family.make, sorted({max(family.min_size, round(x / family.step) * family.step) for x in sizes})))


def published_pattern(name: str, tokens_per_frame: int) -> Pattern:
    """The baseline with the size of the paper's Table 3; Sparse Transformer strides are the tokens of a frame."""
    family = FAMILIES[name]
    return family.make(family.published or max(family.min_size, tokens_per_frame))
