"""Figures of named attention cases: output checked first, dense attention and the peers in one run."""

import functools
import resource
from typing import Any

import jax
import jax.numpy as jnp

from mmi_jax.bench.baselines import torch_attention
from mmi_jax.bench.baselines.dense_attention import MASKED_LIMIT, measure_dense, measure_masked
from mmi_jax.bench.checks.sampled_rows import SampledRows, sample, sample_dense
from mmi_jax.bench.timing.measurements import chosen, dense_flops, rate
from mmi_jax.bench.timing.wall_time import compile_program
from pallas_kernels.attention.api import Implementation, attend_inputs
from pallas_kernels.attention.cases import AttentionCase
from pallas_kernels.attention.inputs import AttentionInputs


def bench_attention(
    case: AttentionCase, *, implementation: Implementation | None, with_dense: bool, with_peers: bool, repeats: int
) -> dict[str, Any]:
    """One case's figures: block-sparse attention, compared with others on the same q, k, v.

    Args:
      implementation: of ours; see `chosen` when None.
      with_dense: also times dense causal attention through JAX.
      with_peers: also times torch's dense attention and FlexAttention.
      repeats: measurements of each function.

    Raises:
      RuntimeError: our output is wrong; a wrong kernel is not timed. A peer that fails gives its reason.
    """
    implementation = chosen(implementation)
    inputs = case.inputs()
    program = compile_program(functools.partial(attend_inputs, implementation=implementation), inputs)
    expected = sample(inputs)
    out, lse = program(inputs)
    errors = expected.check(expected.of(out), expected.of(lse), dtype=case.dtype)
    again = program(inputs)
    is_bit_equal = bool(jnp.array_equal(out, again[0])) and bool(jnp.array_equal(lse, again[1]))
    del out, lse, again
    timing = program.time(inputs, repeats=repeats)
    flops = case.flops(inputs.index)
    figures: dict[str, Any] = {
        "case": case.name,
        "implementation": implementation or "default",
        "tokens": case.num_tokens,
        "heads": f"{case.num_q_heads}/{case.num_kv_heads}",
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "density": round(flops / dense_flops(*inputs.q.shape), 4),
        **errors,
        "is_bit_equal": is_bit_equal,
        "flops": flops,
        **rate(flops, timing),
    }
    others = _others(inputs, expected, flops, with_dense=with_dense, with_peers=with_peers, repeats=repeats)
    figures["others"] = [_with_speedup(other, timing.median_ms) for other in others]
    if jax.default_backend() == "cpu":
        figures["max_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return figures


def _others(
    inputs: AttentionInputs, expected: SampledRows, flops: float, *, with_dense: bool, with_peers: bool, repeats: int
) -> list[dict[str, Any]]:
    """Figures of each other implementation; `expected` holds sampled rows over the lists."""
    if not (with_dense or with_peers):
        return []
    q, k, v, scale = inputs.q, inputs.k, inputs.v, inputs.scale
    dense = sample_dense(q, k, v, scale=scale)
    others = []
    if with_dense:
        others.append(measure_dense(q, k, v, dense, scale=scale, repeats=repeats))
        others += [measure_masked(inputs, expected)] if q.shape[1] <= MASKED_LIMIT else []
    if with_peers:
        others += torch_attention.measure_dense(q, k, v, dense, scale=scale, repeats=repeats)
        others.append(torch_attention.measure_flex(inputs, expected, flops=flops, repeats=repeats))
    return others


def _with_speedup(other: dict[str, Any], our_ms: float) -> dict[str, Any]:
    """The other's figures with our speed-up over it."""
    return other | ({"speedup": round(other["median_ms"] / our_ms, 2)} if "median_ms" in other else {})
