"""Soak: many random prompts in one process, watched for memory that grows and programs that are compiled again."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np

from mmi_jax.engine.prefill import PrefillResult
from mmi_jax.engine.programs.compilation import num_compiled_programs

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def counted_compilations() -> Iterator[Callable[[], int]]:
    """How many programs of any kind XLA has compiled since the block began."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILE_EVENT:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: len(events)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def soak[P](
    run: Callable[[P], PrefillResult],
    prompts: Sequence[P],
    *,
    on_prompt: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Figures after each prompt: seconds, programs and compilations so far, bytes of the host and the device.

    Args:
      run: a prefill; its result is dropped before memory is read.
      prompts: what it is called with, in order.
      on_prompt: called with each prompt's figures.
    """
    log = []
    with counted_compilations() as compilations:
        for number, prompt in enumerate(prompts):
            start = time.perf_counter()
            logits = np.asarray(run(prompt).logits)
            if not np.isfinite(logits).all():
                raise RuntimeError(f"logits must be finite: prompt {number} gave {logits}")
            seconds = round(time.perf_counter() - start, 4)
            gc.collect()
            log.append({"prompt": number, "seconds": seconds, "compilations": compilations(), **memory_in_use()})
            if on_prompt is not None:
                on_prompt(log[-1])
    return log


def memory_in_use() -> dict[str, int]:
    """Memory in use by the process: programs, resident bytes of the host, live arrays and bytes of the device."""
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "programs": num_compiled_programs(),
        "host_bytes": resident_bytes(),
        "array_bytes": sum(array.nbytes for array in jax.live_arrays()),
        "device_bytes": stats.get("bytes_in_use", 0),
    }


def resident_bytes() -> int:
    """Bytes of memory that the process occupies (Linux); 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


def growth(log: Sequence[dict[str, Any]], name: str) -> int:
    """By how much a figure's median over the last third is above that over the middle third."""
    third = len(log) // 3
    middle, last = log[third : 2 * third], log[-third:]
    return int(np.median([figures[name] for figures in last]) - np.median([figures[name] for figures in middle]))
