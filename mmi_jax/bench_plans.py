"""Timing of whole plans on inputs with planted structure: planning and attending apart, dense attention beside them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mmi_jax.attention import batch_geometry, permute, plan_batch, undo
from mmi_jax.bench import Timing, dense_attention, relative_error, time_function
from mmi_jax.blocks import Blocks
from mmi_jax.keys import FramePlace
from mmi_jax.patterns import AShape, Boundary2D, Grid, Pattern, QBoundary, VerticalSlash
from mmi_jax.planted import GRID, GRID_SLASH, LOCAL, VERTICAL_SLASH, HeadStructure, planted_qkv, video_prompt
from pallas_kernels.attention.api import Implementation, attend_inputs

_FRAME = (FramePlace(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCase:
    """A pattern for each third of the heads, and the structure planted for it."""

    patterns: tuple[Pattern, ...]
    structures: tuple[HeadStructure, ...]

    def per_head(self, num_heads: int) -> tuple[tuple[Pattern, ...], tuple[HeadStructure, ...]]:
        """Patterns and structures of `num_heads` heads, in equal runs."""
        choice = [n * len(self.patterns) // num_heads for n in range(num_heads)]
        return tuple(self.patterns[n] for n in choice), tuple(self.structures[n] for n in choice)


PLAN_CASES = {
    "grid": PlanCase(patterns=(Grid(strides=_FRAME),), structures=(GRID,)),
    "grid-slash": PlanCase(patterns=(Grid(strides=_FRAME, use_slash=True),), structures=(GRID_SLASH,)),
    "vertical-slash": PlanCase(patterns=(VerticalSlash(1000, 4096),), structures=(VERTICAL_SLASH,)),
    "a-shape": PlanCase(patterns=(AShape(128, 4096),), structures=(LOCAL,)),
    "q-boundary": PlanCase(
        patterns=(QBoundary({0: VerticalSlash(1000, 4096), 1: Grid(strides=_FRAME)}),), structures=(GRID,)
    ),
    "2d-boundary": PlanCase(
        patterns=(Boundary2D({(1, 1): Grid(strides=_FRAME), (0, 1): VerticalSlash(1000, 4096)}),), structures=(GRID,)
    ),
    "mix": PlanCase(
        patterns=(Grid(strides=_FRAME), Grid(strides=_FRAME, use_slash=True), VerticalSlash(1000, 4096)),
        structures=(GRID, GRID_SLASH, VERTICAL_SLASH),
    ),
}
"""Real plans by name: one pattern for all heads, or a third each."""


def bench_plan(
    name: str, *, num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: str,
    implementation: Implementation | None, with_baseline: bool, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """One plan case's figures on a video of 256-token frames with text before and after it.

    Raises:
      RuntimeError: sampled rows differ from float64 attention over the plan's own lists.
    """
    patterns, structures = PLAN_CASES[name].per_head(num_q_heads)
    layout = video_prompt(num_tokens)
    q, k, v = (
        x[None] for x in planted_qkv(layout, structures, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    )
    blocks, scale = Blocks(), head_dim**-0.5

    def geometry(layout):
        return batch_geometry(layout, patterns, batch=1, num_queries=num_tokens, q_start=None, blocks=blocks)

    def plan(q, k, geometry):
        return plan_batch(patterns, q, k, geometry, scale=scale, blocks=blocks)

    def attend(inputs):
        return attend_inputs(inputs, implementation)

    views, views_time = time_function(geometry, jax.tree.map(jnp.asarray, layout), repeats=repeats)
    planned, plan_time = time_function(plan, q, k, views, repeats=repeats)
    inputs, permute_time = time_function(functools.partial(permute, scale=scale), planned, q, k, v, repeats=repeats)
    (out, lse), attend_time = time_function(attend, inputs, repeats=repeats)
    error = relative_error(inputs, out)
    _, undo_time = time_function(undo, planned, out, lse, repeats=repeats)
    total = _sum(plan_time, permute_time, attend_time, undo_time)
    density = jax.vmap(lambda plan: plan.density())(planned)[0]
    figures: dict[str, Any] = {
        "case": name,
        "implementation": implementation or "default",
        "tokens": num_tokens,
        "heads": f"{num_q_heads}/{num_kv_heads}",
        "head_dim": head_dim,
        "dtype": dtype,
        "density": round(float(density.mean()), 5),
        "relative_error": error,
        "views_ms": round(views_time.median_ms, 3),
        "plan_ms": round(plan_time.median_ms, 3),
        "permute_ms": round(permute_time.median_ms, 3),
        "attend_ms": round(attend_time.median_ms, 3),
        "undo_ms": round(undo_time.median_ms, 3),
        **{name: round(value, 3) for name, value in dataclasses.asdict(total).items()},
    }
    del inputs, out, lse, planned  # dense attention may need the room
    if with_baseline:
        figures |= dense_attention(q, k, v, scale, total, repeats)
    return figures


def _sum(*timings: Timing) -> Timing:
    values = {f.name: sum(getattr(timing, f.name) for timing in timings) for f in dataclasses.fields(Timing)}
    return Timing(**values)
