"""The memory check of a prefill: its plan against the device's memory, and changes that fit where it does not."""

import contextlib
import dataclasses
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mmi_jax.engine.memory.chips import GIB
from mmi_jax.engine.memory.memory_plan import MemoryPlan, MemoryRequest, plan_memory

MIN_CHUNK_TOKENS = 8192
"""The shortest chunk that is suggested: a shorter one leaves a GPU idle."""

NUM_NAMED_BUFFERS = 4
"""The largest live buffers, which a refusal names."""

UPPER_BOUND_BYTES = 6 * GIB
"""Allowance of `_upper_bound` for all that its formula leaves out."""


class DoesNotFitError(ValueError):
    """A prefill needs more memory than its device has; the message names the amount, buffers and changes that fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Memory of a device; bytes.

    Args:
      limit: what JAX may use of it.
      used: what is allocated now.
    """

    limit: int
    used: int = 0


def memory_of(device: Any) -> DeviceMemory | None:
    """The device's memory; None where it does not report it."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return DeviceMemory(limit=stats["bytes_limit"], used=stats.get("bytes_in_use", 0))


def check_fits(request: MemoryRequest, memory: DeviceMemory, *, planned_used: int = 0) -> MemoryPlan:
    """The plan of a prefill that fits.

    Args:
      memory: of its device.
      planned_used: bytes of `memory.used` that the plan counts too: the weights, and a cache that it takes over.

    Raises:
      DoesNotFitError: it does not.
    """
    plan = plan_memory(request)
    others = memory.used - planned_used
    if plan.peak > memory.limit - others:
        raise DoesNotFitError(_refusal(request, plan, memory, others))
    return plan


def _refusal(request: MemoryRequest, plan: MemoryPlan, memory: DeviceMemory, others: int) -> str:
    """Rule, expected, got, and changes that fit."""
    largest = plan.live_in(plan.peak_stage)[:NUM_NAMED_BUFFERS]
    named = ", ".join(f"{buffer.name} {_gib(buffer.num_bytes)}" for buffer in largest)
    used = f" less {_gib(others)} that other arrays take" if others > 2**20 else ""
    options = (
        "; ".join(what_fits(request, memory.limit - others)) or "nothing: the weights leave no memory for a prompt"
    )
    return (
        f"a prefill of {_prompts(request)} must fit the device's memory: it needs {_gib(plan.peak)} at its peak, stage "
        f"{plan.peak_stage!s} ({named}, ...), the device has {_gib(memory.limit)}{used}. Changes that fit: {options}"
    )


def what_fits(request: MemoryRequest, free: int) -> Iterator[str]:
    """Changes of the prefill, each alone, with which it fits `free` bytes."""
    batch, blocks = request.prefill.batch, request.prefill.options.block_sizes
    chunks = _powers_of_two_below(request.prefill.lengths.chunk_tokens)
    for chunk_tokens in (n for n in chunks if n % blocks.q == 0 and n % blocks.kv == 0):
        if (peak := _peak(request.with_options(chunk_tokens=chunk_tokens))) <= free:
            yield f"chunk_tokens={chunk_tokens}, {_gib(peak)}"
            break
    smaller_batches = (n for n in range(batch - 1, 0, -1) if _peak(request.with_prompts(batch=n)) <= free)
    if fitting_batch := next(smaller_batches, None):
        yield f"{fitting_batch} prompt{'s' if fitting_batch > 1 else ''} at a time"
    if longest := longest_that_fits(request, free):
        yield f"at most {longest:,} tokens in the same way"


def longest_that_fits(request: MemoryRequest, free: int) -> int | None:
    """The longest padded prompt that fits, up to the request's length; None if none does."""
    lengths = [n for n in request.prefill.buckets.lengths() if n <= request.prefill.num_tokens]
    low, high = -1, len(lengths)
    while high - low > 1:
        middle = (low + high) // 2
        is_shorter = _peak(request.with_prompts(num_tokens=lengths[middle])) <= free
        low, high = (middle, high) if is_shorter else (low, middle)
    return lengths[low] if low >= 0 else None


def _peak(request: MemoryRequest) -> int:
    """Bytes; more than any device has where the sizes do not fit each other."""
    try:
        return plan_memory(request).peak
    except ValueError:
        return 2**63


def _powers_of_two_below(chunk_tokens: int) -> Iterator[int]:
    """The powers of two below, the largest first, down to `MIN_CHUNK_TOKENS`."""
    size = 1 << max((chunk_tokens - 1).bit_length() - 1, 0)
    while size >= MIN_CHUNK_TOKENS:
        yield size
        size //= 2


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def _prompts(request: MemoryRequest) -> str:
    return f"{request.prefill.batch} x {request.prefill.num_tokens:,} tokens"


def describe(plan: MemoryPlan) -> list[tuple[str, str, str, str]]:
    """Name, shape, size and stages of every buffer, the largest first."""
    rows = sorted(plan.buffers, key=lambda b: -b.num_bytes)
    return [(b.name, " x ".join(map(str, b.shape)), _gib(b.num_bytes), _stages(b.live)) for b in rows]


def _stages(live: tuple[str, ...]) -> str:
    return f"{live[0]}" if len(live) == 1 else f"{live[0]} to {live[-1]}"


def check_memory(request: MemoryRequest, reused_bytes: int) -> None:
    """Plans a prefill on the default device, which holds its weights, if the device reports its memory and may lack it.

    Args:
      reused_bytes: of a cache whose memory the prefill takes over.

    Raises:
      DoesNotFitError: it does not fit.
    """
    memory = memory_of(jax.devices()[0])
    if memory is not None and memory.limit - memory.used < _upper_bound(request):
        check_fits(request, memory, planned_used=min(memory.used, request.weight_bytes + reused_bytes))


def _upper_bound(request: MemoryRequest) -> int:
    """An upper bound of the bytes except the weights, from sizes alone: a plan takes seconds to make."""
    config, lengths = request.prefill.config, request.prefill.lengths
    cache = 2 * config.num_layers * lengths.capacity * config.num_kv_heads * config.head_dim
    row = max(config.num_heads * config.head_dim, config.embed_dim)
    rows = 12 * lengths.chunk_tokens + lengths.padded_tokens + 4 * lengths.capacity
    width = jnp.dtype(request.dtype).itemsize
    return request.prefill.batch * width * (cache + rows * row) + UPPER_BOUND_BYTES


@contextlib.contextmanager
def explained_exhaustion(request: MemoryRequest) -> Iterator[None]:
    """Turns a device's exhausted memory into an error that says what was planned.

    Raises:
      DoesNotFitError: the block ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold arrays, and the next run needs their memory
        plan, memory = plan_memory(request), memory_of(jax.devices()[0])
        limit = "" if memory is None else f" of {_gib(memory.limit)}, {_gib(memory.used)} of them in use now"
        options = "; ".join(what_fits(request, plan.peak * 9 // 10)) or "a shorter prompt"
        raise DoesNotFitError(
            f"the device ran out of memory{limit}, in a prefill of {_prompts(request)} that was planned to need "
            f"{_gib(plan.peak)} at most, stage {plan.peak_stage!s}. What needs a tenth less: {options}"
        ) from error
