"""Measurements under a name, or the reason why there is none."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mmi_jax.bench.timing.wall_time import Timing
from pallas_kernels.attention.api import Implementation
from pallas_kernels.attention.inputs import AttentionInputs

REASON_LENGTH = 300
"""Characters of a failure's message that is kept: compilers write pages."""


def measurement(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures under this name, or `error` with the reason: one failure must not end a run on a rented machine."""
    try:
        return {"name": name} | measure()
    except Exception as error:
        return {"name": name, "error": reason(error)}


def reason(error: BaseException) -> str:
    """The error on one line: its type when its message would not say what it is, and the reasons of a group."""
    if isinstance(error, ExceptionGroup):
        return f"{error.message}: {'; '.join(map(reason, error.exceptions))}"
    message = " ".join(str(error).split())
    is_plain = isinstance(error, RuntimeError | ValueError | NotImplementedError) and message
    return (message if is_plain else f"{type(error).__name__}: {message}")[:REASON_LENGTH]


def rate(flops: float, timing: Timing) -> dict[str, float]:
    """The timing's fields and the rate at which these floating-point operations were done."""
    return timing.figures() | {"tflops_per_s": round(flops / timing.median_ms / 1e9, 3)}


def dense_flops(num_q_heads: int, num_tokens: int, head_dim: int) -> float:
    """Floating-point operations of the causal half: QK and PV, both halves of a multiply-add counted."""
    return 2.0 * num_q_heads * num_tokens**2 * head_dim


def tile_flops(inputs: AttentionInputs) -> float:
    """Floating-point operations of the visited tiles, as `AttentionCase.flops` counts them."""
    index = inputs.index
    tiles = float(np.asarray(index.count, np.float64).sum())
    return 4.0 * tiles * index.block_q * index.block_kv * inputs.q.shape[-1]


def chosen(implementation: Implementation | None) -> Implementation | None:
    """The backend to time: on a GPU the Hopper kernel unless named, so that nothing else is timed in its name."""
    return "mosaic_gpu" if implementation is None and jax.default_backend() == "gpu" else implementation
