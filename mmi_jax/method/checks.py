"""Checks of arguments: whether arrays, layout and patterns fit each other, and whether sizes are in range."""

from collections.abc import Sequence

from mmi_jax.layout import TokenIndex, TokenLayout
from pallas_kernels.notation import Array, Float


def check_attention(
    q: Float[Array, "..."],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    layout: TokenLayout,
    q_start: TokenIndex | None,
) -> None:
    """Raises ValueError for a batch whose arrays do not fit each other; q `[b, t, h, d]`, k and v `[b, s, g, d]`."""
    check_heads(q.shape[2], k.shape[2])
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q, k, v must agree in batch and head dim: got {q.shape}, {k.shape}, {v.shape}")
    _check_tokens(q.shape[1], k.shape[1], layout, q_start)
    batch, num_layouts = q.shape[0], layout.modality.shape[0] if layout.modality.ndim > 1 else 1
    if num_layouts not in (1, batch):
        raise ValueError(f"the layout must describe 1 example or {batch}, got {num_layouts}")


def check_example(
    q: Float[Array, "..."], k: Float[Array, "..."], layout: TokenLayout, q_start: TokenIndex | None
) -> None:
    """Raises ValueError unless q is `[t, h, d]`, k `[s, g, d]`, the layout `[s]`, and they fit each other."""
    if q.ndim != 3 or k.ndim != 3 or layout.modality.ndim != 1:
        raise ValueError(
            f"a plan is of one example: expected q [t, h, d], k [s, g, d] and a layout [s], got {q.shape}, {k.shape} "
            f"and {layout.modality.shape}"
        )
    check_heads(q.shape[1], k.shape[1])
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must agree in head dim: got {q.shape}, {k.shape}")
    _check_tokens(q.shape[0], k.shape[0], layout, q_start)


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError unless every kv head serves as many query heads as the others, at least one."""
    if min(num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_q_heads={num_heads} must be a positive multiple of num_kv_heads={num_kv_heads}")


def per_head[P](patterns: P | Sequence[P], num_heads: int) -> tuple[P, ...]:
    """The patterns, one for each query head; raises ValueError unless there is one, or one for each."""
    if not isinstance(patterns, Sequence):
        return (patterns,) * num_heads
    if len(patterns) != num_heads:
        raise ValueError(f"patterns must name one pattern for each of the {num_heads} query heads, got {len(patterns)}")
    return tuple(patterns)


def check_at_least(pattern: object, **minima: int) -> None:
    """Raises ValueError unless each named field is at least the given number."""
    for name, minimum in minima.items():
        value = getattr(pattern, name)
        if value < minimum:
            raise ValueError(f"{type(pattern).__name__}.{name} must be at least {minimum}, got {value}")


def _check_tokens(num_queries: int, num_keys: int, layout: TokenLayout, q_start: TokenIndex | None) -> None:
    if num_queries > num_keys:
        raise ValueError(f"there are more queries than keys: q has {num_queries} tokens, k has {num_keys}")
    if layout.num_tokens != num_keys:
        raise ValueError(f"the layout must describe every kv token: it has {layout.num_tokens}, k has {num_keys}")
    if isinstance(q_start, int) and not 0 <= q_start <= num_keys - num_queries:
        raise ValueError(f"queries must lie among the keys: {q_start=} and {num_queries} queries, {num_keys} keys")
