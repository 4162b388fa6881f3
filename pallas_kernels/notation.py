"""The one key of axis letters; every annotation, einsum string and shape suffix in the project uses it.

| letter | axis | letter | axis |
|---|---|---|---|
| `b` | batch | `i` | q blocks |
| `h` | query heads | `j` | visited kv blocks of one q block |
| `g` | kv heads | `l` | entries of a head's block list |
| `t` | query tokens | `n` | images, videos, or rows of a small table |
| `s` | kv tokens | `p` | vision patches |
| `d` | head dim | `c` | colour channels |
| `e` | model dim | `x` | kv rows gathered for one query head |
| `f` | output features of a matrix | | |

`h` is always a whole multiple of `g`: query head `h` reads kv head `h // (num_q_heads // num_kv_heads)`.
Lengths and positions are in tokens, int32. Kernels are head-major (`h t d`), models token-major (`t h d`).
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

AnyArray = jax.Array | np.ndarray
"""Host or device: for values that are built on the host and later traced."""

type Scalar = jax.Array | int
"""A number inside a kernel: traced, or known when the kernel is traced."""

type Ref = Any
"""An array inside a kernel, in device or on-chip memory, a barrier or an accumulator: `ref[...]`, `ref.at[...]`.

JAX 0.11 has no public type for it: `jax.Ref` declares no `shape`, and its `at` returns nothing."""

PAD_KV_POS = 2**30
"""Position of a kv row that no query reaches; every real position is smaller."""

PAD_Q_POS = -1
"""Position of a query row that reaches no key."""

MASKED_SCORE = -1e38
"""A masked score. It is finite, so that the difference of two is 0 and not NaN, and so far below `INITIAL_ROW_MAX` that
its weight is an exact 0."""

INITIAL_ROW_MAX = -1e30
"""The running maximum of a row before the first attended key: below every real score."""

__all__ = [
    "INITIAL_ROW_MAX",
    "MASKED_SCORE",
    "PAD_KV_POS",
    "PAD_Q_POS",
    "AnyArray",
    "Ref",
    "Scalar",
    "Array",
    "Bool",
    "Float",
    "Int32",
]
