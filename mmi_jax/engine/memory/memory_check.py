"""Whether a prefill fits a device, and what would."""

import contextlib
import dataclasses
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mmi_jax.engine.memory.chips import GIB
from mmi_jax.engine.memory.memory_plan import MemoryPlan, MemoryTask, bytes_of, plan_memory

SMALLEST_CHUNK = 8192
"""Chunks below it would leave a GPU idle; tokens."""


class DoesNotFitError(ValueError):
    """A prefill needs more memory than its device has; the message says how much, and what would fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """Memory of a device; bytes.

    Args:
      limit: what JAX may use of it.
      used: what is allocated now.
    """

    limit: int
    used: int = 0


def room_of(device: Any) -> Room | None:
    """The device's memory; None where it does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return Room(limit=stats["bytes_limit"], used=stats.get("bytes_in_use", 0))


def check_fits(task: MemoryTask, room: Room, *, held: int = 0) -> MemoryPlan:
    """The plan of a prefill that fits.

    Args:
      room: of its device.
      held: bytes of `room.used` that the plan counts too: the weights, and a cache that it takes over.

    Raises:
      DoesNotFitError: it does not.
    """
    plan = plan_memory(task)
    free = room.limit - (room.used - held)
    if plan.peak > free:
        raise DoesNotFitError(_refusal(task, plan, room, room.used - held))
    return plan


def _refusal(task: MemoryTask, plan: MemoryPlan, room: Room, others: int) -> str:
    """Rule, expected, got, and what would fit."""
    parts = sorted((b for b in plan.buffers if plan.peak_stage in b.alive), key=lambda b: -b.num_bytes)[:4]
    largest = ", ".join(f"{b.name} {_gib(b.num_bytes)}" for b in parts)
    used = f" less {_gib(others)} that other arrays take" if others > 2**20 else ""
    options = "; ".join(what_fits(task, room.limit - others)) or "nothing: the weights leave no room for a prompt"
    return (
        f"a prefill of {task.batch} x {task.num_tokens:,} tokens must fit the device: it needs {_gib(plan.peak)} "
        f"({largest}, ...), the device has {_gib(room.limit)}{used}. What would fit: {options}"
    )


def what_fits(task: MemoryTask, free: int) -> Iterator[str]:
    """Changes of the task, each alone, with which it would fit `free` bytes."""
    fits = lambda **changes: _peak(dataclasses.replace(task, **changes)) <= free  # noqa: E731
    chunk = task.sizes.chunk
    smaller = [n for n in _halves(chunk) if n % task.blocks.q == 0 and n % task.blocks.kv == 0]
    if found := next((n for n in smaller if fits(chunk_tokens=n)), None):
        yield f"chunk_tokens={found}, {_gib(_peak(dataclasses.replace(task, chunk_tokens=found)))}"
    if task.batch > 1 and (batch := next((n for n in range(task.batch - 1, 0, -1) if fits(batch=n)), None)):
        yield f"{batch} prompt{'s' if batch > 1 else ''} at a time"
    if longest := longest_that_fits(task, free):
        yield f"at most {longest:,} tokens in the same way"


def longest_that_fits(task: MemoryTask, free: int) -> int | None:
    """The longest padded prompt that would fit, up to the task's own; None if none does. Memory grows with length."""
    lengths = [n for n in task.buckets.lengths() if n <= task.num_tokens]
    low, high = -1, len(lengths)
    while high - low > 1:
        middle = (low + high) // 2
        is_shorter = _peak(dataclasses.replace(task, num_tokens=lengths[middle])) <= free
        low, high = (middle, high) if is_shorter else (low, middle)
    return lengths[low] if low >= 0 else None


def _peak(task: MemoryTask) -> int:
    """Bytes; more than any device has where the sizes do not fit each other."""
    try:
        return plan_memory(task).peak
    except ValueError:
        return 2**63


def _halves(chunk: int) -> Iterator[int]:
    """Powers of two below the chunk, the largest first."""
    size = 1 << max((chunk - 1).bit_length() - 1, 0)
    while size >= SMALLEST_CHUNK:
        yield size
        size //= 2


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def describe(plan: MemoryPlan) -> list[tuple[str, str, str, str]]:
    """Name, shape, size and stages of every buffer, the largest first."""
    rows = sorted(plan.buffers, key=lambda b: -b.num_bytes)
    return [(b.name, " x ".join(map(str, b.shape)), _gib(b.num_bytes), _stages(b.alive)) for b in rows]


def _stages(alive: tuple[str, ...]) -> str:
    return alive[0] if len(alive) == 1 else f"{alive[0]} to {alive[-1]}"


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights, arrays or shapes."""
    from flax import nnx  # here, so that attention and its benchmarks need no flax

    return bytes_of(nnx.split(model)[1])


def check_room(task: MemoryTask, taken_over: int) -> None:
    """Plans a prefill on the default device, whose weights lie there, where that tells its memory and it may be short.

    Args:
      taken_over: bytes of a cache whose memory the prefill takes over.

    Raises:
      DoesNotFitError: it does not fit.
    """
    room = room_of(jax.devices()[0])
    if room is not None and room.limit - room.used < _rough_need(task):
        check_fits(task, room, held=min(room.used, task.weight_bytes + taken_over))


def _rough_need(task: MemoryTask) -> int:
    """Bytes that are more than enough beside the weights: what has them needs no plan, which takes seconds to make."""
    config, sizes, width = task.config, task.sizes, jnp.dtype(task.dtype).itemsize
    cache = 2 * config.num_layers * sizes.capacity * config.num_kv_heads * config.head_dim
    row = max(config.num_heads * config.head_dim, config.embed_dim)
    rows = 12 * sizes.chunk + sizes.padded + 4 * sizes.capacity
    return task.batch * width * (cache + rows * row) + 6 * GIB


@contextlib.contextmanager
def explained_exhaustion(task: MemoryTask) -> Iterator[None]:
    """Turns a device's exhausted memory into an error that says what was planned.

    Raises:
      DoesNotFitError: the block ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold arrays, and the next run needs the room
        plan, room = plan_memory(task), room_of(jax.devices()[0])
        given = "" if room is None else f" of {_gib(room.limit)}, {_gib(room.used)} of them in use now"
        options = "; ".join(what_fits(task, plan.peak * 9 // 10)) or "a shorter prompt"
        raise DoesNotFitError(
            f"the device ran out of memory{given}, in a prefill of {task.batch} x {task.num_tokens:,} tokens that was "
            f"planned to hold {_gib(plan.peak)} at most. What needs a tenth less: {options}"
        ) from error
