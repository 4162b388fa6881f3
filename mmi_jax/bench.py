"""Timing of named attention cases: output checked first, baseline and candidate in one run, a JSON line last."""

import dataclasses
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels import block_sparse_attention
from pallas_kernels.attention.api import Implementation
from pallas_kernels.attention.cases import AttentionCase
from pallas_kernels.attention.inputs import AttentionInputs

NUM_CHECKED_ROWS = 16
"""Query rows of each checked head that are compared with float64."""

ERROR_LIMIT = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Relative error against float64 above which a case is not timed: a few units in the last place of the type."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall times of one function: median and spread over repeats, and the first call's compile time; milliseconds."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    compile_ms: float


def time_function(fun: Callable[..., Any], *args: Any, repeats: int = 5) -> tuple[Any, Timing]:
    """The function's output and its timing, jitted, after one warm-up call."""
    start = time.perf_counter()
    compiled = jax.jit(fun).lower(*args).compile()
    compile_ms = (time.perf_counter() - start) * 1e3
    out = jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append((time.perf_counter() - start) * 1e3)
    timing = Timing(
        median_ms=statistics.median(times), fastest_ms=min(times), slowest_ms=max(times), compile_ms=compile_ms
    )
    return out, timing


def rows_in_float64(inputs: AttentionInputs, head: int, rows: np.ndarray) -> np.ndarray:
    """Attention of some query rows of one head in float64, straight from the definition; `[rows, d]`."""
    index = inputs.index
    first, num_full, count, pos_row = (
        np.asarray(x[head]) for x in (index.first, index.num_full, index.count, index.pos_row)
    )
    start, interval, intervals = (np.asarray(x[head]) for x in (index.start, index.interval, index.intervals))
    k, v = (
        np.concatenate([np.asarray(shared[head // inputs.heads_per_kv_head]), np.asarray(extra[head])]).astype(
            np.float64
        )
        for shared, extra in ((inputs.k, inputs.k_extra), (inputs.v, inputs.v_extra))
    )
    q, q_pos = np.asarray(inputs.q[head]).astype(np.float64), np.asarray(inputs.q_pos[head])
    out = np.zeros((len(rows), q.shape[1]))
    for n, row in enumerate(rows):
        i = row // index.block_q
        kv_pos = np.asarray(inputs.kv_pos[pos_row[i]])
        sees = np.zeros(len(kv_pos), bool)
        for j, entry in enumerate(range(first[i], first[i] + count[i])):
            block = slice(start[entry], start[entry] + index.block_kv)
            low, high = intervals[interval[entry]]
            distance = q_pos[row] - kv_pos[block]
            sees[block] |= (distance >= max(low, 0)) & (distance < high) | (j < num_full[i])
        scores = k[sees] @ q[row] * inputs.scale
        weights = np.exp(scores - scores.max(initial=-np.inf))
        out[n] = weights @ v[sees] / weights.sum() if sees.any() else 0.0
    return out


def relative_error(inputs: AttentionInputs, out, *, seed: int = 0) -> float:
    """Largest relative error, over the first and last head, of sampled rows against float64; 2-norm.

    Raises:
      RuntimeError: it exceeds what the type's rounding explains; a wrong kernel is not timed.
    """
    candidates = np.random.default_rng(seed).permutation(inputs.q.shape[1])[: 4 * NUM_CHECKED_ROWS]
    errors = []
    for head in sorted({0, inputs.q.shape[0] - 1}):
        rows = candidates[np.asarray(inputs.q_pos[head])[candidates] >= 0][:NUM_CHECKED_ROWS]
        expected = rows_in_float64(inputs, head, rows)
        got = np.asarray(out[head])[rows].astype(np.float64)
        errors.append(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    limit = ERROR_LIMIT[str(inputs.q.dtype)]
    if not max(errors) <= limit:
        raise RuntimeError(f"the relative error against float64 must be at most {limit}, got {max(errors):.2e}")
    return float(max(errors))


def bench_attention(
    case: AttentionCase, *, implementation: Implementation | None, with_baseline: bool, repeats: int
) -> dict[str, Any]:
    """One case's figures: block-sparse attention, and dense causal attention on the same q, k, v beside it.

    Raises:
      RuntimeError: the output is wrong; a wrong kernel is not timed.
    """
    inputs = case.inputs()

    def sparse(inputs):
        return block_sparse_attention(
            inputs.q, inputs.k, inputs.v, inputs.index, q_pos=inputs.q_pos, kv_pos=inputs.kv_pos, scale=inputs.scale,
            implementation=implementation,
        )[0]  # fmt: skip

    out, timing = time_function(sparse, inputs, repeats=repeats)
    error = relative_error(inputs, out)
    flops = case.flops(inputs.index)
    dense_flops = 2.0 * case.num_q_heads * case.num_tokens**2 * case.head_dim
    figures: dict[str, Any] = {
        "case": case.name,
        "implementation": implementation or "default",
        "tokens": case.num_tokens,
        "heads": f"{case.num_q_heads}/{case.num_kv_heads}",
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "density": round(flops / dense_flops, 4),
        "relative_error": error,
        "flops": flops,
        **{name: round(value, 3) for name, value in dataclasses.asdict(timing).items()},
        "tflops_per_s": round(flops / timing.median_ms / 1e9, 3),
        "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if with_baseline:
        q, k, v = (x.transpose(1, 0, 2)[None] for x in (inputs.q, inputs.k, inputs.v))
        figures |= dense_attention(q, k, v, inputs.scale, timing, repeats)
    return figures


def dense_attention(q, k, v, scale: float, ours: Timing, repeats: int) -> dict[str, Any]:
    """Figures of dense causal attention through `jax.nn.dot_product_attention`: cuDNN on a GPU, XLA elsewhere."""
    name = "cudnn" if jax.default_backend() == "gpu" else "xla"

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation=name)

    _, timing = time_function(dense, q, k, v, repeats=repeats)
    return {
        "baseline": f"dot_product_attention(implementation={name!r}), dense causal",
        "baseline_median_ms": round(timing.median_ms, 3),
        "baseline_fastest_ms": round(timing.fastest_ms, 3),
        "baseline_slowest_ms": round(timing.slowest_ms, 3),
        "speedup": round(timing.median_ms / ours.median_ms, 2),
    }


def machine() -> dict[str, Any]:
    """Where a figure was measured: device, versions, commit, date."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "jax": jax.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return f"{' '.join(sorted(names)) or platform.processor()}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit of the checkout this package runs from; "unknown" for an installed wheel."""
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else "unknown"
