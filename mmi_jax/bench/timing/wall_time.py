"""Wall times of compiled functions; on an accelerator many calls are queued, so that dispatch is not measured."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

FILL_MS = 150.0
"""Milliseconds that the queued calls of one measurement fill on an accelerator; a longer call is measured alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall times of one call: median and spread over measurements, and the compile time; milliseconds."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    compile_ms: float

    def figures(self) -> dict[str, float]:
        """The fields, rounded to a microsecond."""
        return {name: round(value, 3) for name, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled function and the milliseconds that compiling it took, in parallel with others if compiled together."""

    call: Callable[..., Any]
    compile_ms: float

    def __call__(self, *args: PyTree) -> PyTree:
        """The function's output, computed."""
        return jax.block_until_ready(self.call(*args))

    def time(self, *args: PyTree, repeats: int) -> Timing:
        """The timing of calls with these arguments; no output outlives the call after it."""
        times = time_calls(lambda: self.call(*args), jax.block_until_ready, repeats=repeats)
        return summary(times, compile_ms=self.compile_ms)


def compile_program(fun: Callable[..., Any], *args: PyTree) -> Program:
    """The function compiled for arguments of these shapes: arrays, or `jax.ShapeDtypeStruct`s in their place."""
    return compile_lowered(jax.jit(fun).lower(*args))


def compile_programs(functions: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> dict[str, Program]:
    """Several functions compiled in parallel, each for its own arguments, before anything is timed."""
    lowered = {name: jax.jit(fun).lower(*args) for name, (fun, args) in functions.items()}
    with ThreadPoolExecutor() as pool:
        return dict(zip(lowered, pool.map(compile_lowered, lowered.values()), strict=True))


def compile_lowered(lowered: jax.stages.Lowered) -> Program:
    """The traced function compiled; may run in its own thread."""
    start = time.perf_counter()
    compiled = lowered.compile()
    return Program(call=compiled, compile_ms=(time.perf_counter() - start) * 1e3)


def time_calls(
    call: Callable[[], Any], wait: Callable[[Any], Any], *, repeats: int, fill_ms: float | None = None
) -> list[float]:
    """Milliseconds of one call, once for each measurement, after two calls that warm up and say how many to queue.

    Args:
      call: starts the work and may return before it is done.
      wait: returns when the work behind `call`'s output is done.
      repeats: measurements.
      fill_ms: what one measurement's queued calls fill; `FILL_MS` on an accelerator and one call elsewhere when None.
    """
    if fill_ms is None:
        fill_ms = 0.0 if jax.default_backend() == "cpu" else FILL_MS
    wait(call())
    start = time.perf_counter()
    wait(call())
    num_calls = max(1, int(fill_ms / 1e3 / (time.perf_counter() - start)))
    return [_measure(call, wait, num_calls) for _ in range(repeats)]


def _measure(call, wait, num_calls: int) -> float:
    start = time.perf_counter()
    for _ in range(num_calls - 1):
        call()
    wait(call())
    return (time.perf_counter() - start) * 1e3 / num_calls


def summary(times_ms: list[float], *, compile_ms: float) -> Timing:
    """Median and spread of measurements."""
    return Timing(
        median_ms=statistics.median(times_ms),
        fastest_ms=min(times_ms),
        slowest_ms=max(times_ms),
        compile_ms=compile_ms,
    )


def matmul_tflops_per_s(repeats: int = 5) -> float:
    """The rate of one large matrix product, that other rates are compared with: bfloat16, or float32 on a CPU."""
    on_cpu = jax.default_backend() == "cpu"
    size, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    a, b = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    timing = compile_program(jnp.matmul, a, b).time(a, b, repeats=repeats)
    return 2 * size**3 / timing.median_ms / 1e9


def copy_bytes_per_s(repeats: int = 5) -> float:
    """The rate of one large copy on the device, bytes read plus bytes written, for memory-bound rates."""
    x = jnp.ones((2**24 if jax.default_backend() == "cpu" else 2**30,), jnp.float32)
    timing = compile_program(jnp.copy, x).time(x, repeats=repeats)
    return 2 * x.nbytes / timing.median_ms * 1e3
