"""Dense causal attention through JAX, the baseline of every sparse figure."""

import functools
import os
from typing import Any

import jax
import numpy as np

from mmi_jax.bench.baselines import torch_attention
from mmi_jax.bench.checks.sampled_rows import SampledRows, sample_dense
from mmi_jax.bench.synthetic import GRID, synthetic_qkv, video_prompt
from mmi_jax.bench.timing.measurements import dense_flops, measurement, rate
from mmi_jax.bench.timing.wall_time import compile_program
from pallas_kernels import coverage
from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.notation import Array, Float

MASKED_LIMIT = 4096
"""Tokens up to which dense attention also runs under the lists' mask, to compare errors: the mask is quadratic."""


def measure_dense(
    q: Float[Array, "h t d"],
    k: Float[Array, "g t d"],
    v: Float[Array, "g t d"],
    expected: SampledRows,
    *,
    scale: float,
    repeats: int,
) -> dict[str, Any]:
    """Figures of dense causal `jax.nn.dot_product_attention`, checked first: cuDNN on a GPU, XLA elsewhere.

    Args:
      q, k, v: head-major.
      expected: of `sample_dense`.
      scale: factor on the scores.
      repeats: measurements.
    """

    def measure():
        arrays = [x.transpose(1, 0, 2)[None] for x in (q, k, v)]
        program = compile_program(_attention(scale=scale, is_causal=True), *arrays)
        out = np.asarray(program(*arrays)[0, expected.rows, expected.heads])
        errors = expected.check(out, None, dtype=str(q.dtype))
        return errors | rate(dense_flops(*q.shape), program.time(*arrays, repeats=repeats))

    return measurement(f"{_backend()} dense, jax", measure)


def measure_masked(inputs: AttentionInputs, expected: SampledRows) -> dict[str, Any]:
    """The error of dense attention under the lists' own mask, against which ours is held; not timed.

    Args:
      inputs: short, as the mask is quadratic.
      expected: of `sample`.
    """

    def measure():
        arrays = [x.transpose(1, 0, 2)[None] for x in (inputs.q, inputs.k, inputs.v)]
        mask = coverage(inputs.index, inputs.q_pos, inputs.kv_pos)[None] > 0
        program = compile_program(
            lambda mask, *arrays: _attention(scale=inputs.scale)(*arrays, mask=mask), mask, *arrays
        )
        out = np.asarray(program(mask, *arrays)[0, expected.rows, expected.heads])
        return expected.check(out, None, dtype=str(inputs.q.dtype))

    return measurement(f"{_backend()} masked, jax", measure)


def _backend() -> str:
    return "cudnn" if jax.default_backend() == "gpu" else "xla"


def _attention(**kwargs):
    return functools.partial(jax.nn.dot_product_attention, implementation=_backend(), **kwargs)


@functools.cache
def measure_synthetic_dense(
    num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: str, *, repeats: int, with_peers: bool
) -> tuple[dict[str, Any], ...]:
    """Figures of dense attention of synthetic heads on a video, through JAX and, with peers, torch; measured once."""
    structures = (GRID,) * num_q_heads
    q, k, v = synthetic_qkv(
        video_prompt(num_tokens), structures, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype
    )
    q, k, v = (x.transpose(1, 0, 2) for x in (q, k, v))
    scale = head_dim**-0.5
    expected = sample_dense(q, k, v, scale=scale)
    rows = [measure_dense(q, k, v, expected, scale=scale, repeats=repeats)]
    if with_peers:
        rows += torch_attention.measure_dense(q, k, v, expected, scale=scale, repeats=repeats)
    return tuple(rows)


def best_dense(
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
    *,
    limit: int,
    repeats: int,
    with_peers: bool,
) -> dict[str, Any]:
    """The fastest dense attention on a plan's prompt: measured up to `limit` tokens, extrapolated by the square above.

    Args:
      num_tokens: of the prompt.
      limit: tokens at which dense attention is measured at most.
    """
    measured_at = min(num_tokens, limit)
    measurements = measure_synthetic_dense(
        measured_at, num_q_heads, num_kv_heads, head_dim, dtype, repeats=repeats, with_peers=with_peers
    )
    timed = [figures for figures in measurements if "median_ms" in figures]
    if not timed:
        return {"dense": measurements[0]["name"], "dense_error": measurements[0]["error"]}
    best = min(timed, key=lambda figures: figures["median_ms"])
    return {
        "dense": best["name"],
        "dense_ms": round(best["median_ms"] * (num_tokens / measured_at) ** 2, 3),
        "dense_measured_at": measured_at,
        "is_dense_extrapolated": measured_at < num_tokens,
        "dense_of_all_ms": {
            figures["name"]: figures.get("median_ms", figures.get("error")) for figures in measurements
        },
    }


def dense_fits(num_heads: int, num_tokens: int) -> bool:
    """Whether dense attention is worth trying: cuDNN needs no extra memory, XLA holds all scores in float32."""
    if jax.default_backend() == "gpu":
        return True
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 3 * 4 * num_heads * num_tokens**2 < memory
