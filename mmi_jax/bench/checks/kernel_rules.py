"""Small problems that use every rule of the kernel's contract at once, against the float32 reference on the CPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.bench.checks.sampled_rows import LSE_LIMIT
from mmi_jax.bench.timing.measurements import chosen
from pallas_kernels.attention import reference
from pallas_kernels.attention.api import Implementation, attend_inputs
from pallas_kernels.attention.cases import late_peak_inputs, mixed_inputs
from pallas_kernels.attention.inputs import AttentionInputs

RULE_CASES: dict[str, Callable[[], AttentionInputs]] = {
    "tiny": mixed_inputs,
    "d128 fp16, 7 query heads on one, no extra rows": functools.partial(
        mixed_inputs, head_dim=128, dtype="float16", num_extra=0, num_q_heads=7, num_q_blocks=8, num_shared=2048
    ),
    "d80, kv blocks of 64": functools.partial(
        mixed_inputs, head_dim=80, block_kv=64, num_q_heads=8, num_kv_heads=2, num_q_blocks=16, num_shared=1024
    ),
    "d128, blocks of 256": functools.partial(
        mixed_inputs, head_dim=128, block_q=256, block_kv=256, num_shared=1024, num_extra=512
    ),
    "d64, 28 query heads on 4": functools.partial(
        mixed_inputs, num_q_heads=28, num_kv_heads=4, num_q_blocks=32, num_shared=4096
    ),
    "d128, steep": functools.partial(
        mixed_inputs, head_dim=128, num_q_blocks=8, num_shared=2048, num_extra=0, steepness=200.0
    ),
    "d256": functools.partial(
        mixed_inputs, head_dim=256, num_q_heads=6, num_kv_heads=2, num_q_blocks=16, num_shared=2048
    ),
    "late peak": late_peak_inputs,
}
"""Makers of problems by name; "tiny" is short enough for a sanitizer."""


def check_rules(name: str, *, implementation: Implementation | None) -> dict[str, Any]:
    """Errors of one problem, and that empty rows are exact and two runs bit-equal.

    Raises:
      RuntimeError: a rule does not hold; the message names it.
    """
    inputs = RULE_CASES[name]()
    run = jax.jit(lambda inputs: attend_inputs(inputs, chosen(implementation)))
    first, second = run(inputs), run(inputs)
    is_bit_equal = all(bool(jnp.array_equal(a, b)) for a, b in zip(first, second, strict=True))
    out, lse = (np.asarray(x).astype(np.float64) for x in first)
    want, want_lse = _reference(inputs)
    has_keys = np.isfinite(want_lse)
    error = float(np.linalg.norm(out - want) / np.linalg.norm(want))
    lse_error = float(np.abs(lse[has_keys] - want_lse[has_keys]).max())
    limit = float(jnp.finfo(inputs.q.dtype).eps)  # weights and output are each rounded once: half an ulp, twice
    rules = [
        (is_bit_equal, "two runs must be bit-equal"),
        (bool((out[~has_keys] == 0).all()), "rows that visit nothing must be exact zeros"),
        (bool(np.isneginf(lse[~has_keys]).all()), "rows that visit nothing must have a log-sum-exp of -inf"),
        (error <= limit, f"the relative error must be at most {limit}, got {error:.2e}"),
        (lse_error <= LSE_LIMIT, f"the log-sum-exp must be within {LSE_LIMIT}, got {lse_error:.2e}"),
    ]
    for holds, message in rules:
        if not holds:
            raise RuntimeError(message)
    num_empty = int((~has_keys).sum())
    return {"case": name, "relative_error": error, "lse_error": lse_error, "num_empty_rows": num_empty}


def _reference(inputs: AttentionInputs) -> tuple[np.ndarray, np.ndarray]:
    """What the reference gives on the CPU, so that a sanitizer on the GPU sees the kernel alone."""
    with jax.default_device(jax.devices("cpu")[0]):
        out, lse = reference.attend(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), inputs))
        return np.asarray(out).astype(np.float64), np.asarray(lse).astype(np.float64)
