"""Figures of whole plans on synthetic heads: each stage, and the whole as one program."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.bench.checks.sampled_rows import sample, sample_dense
from mmi_jax.bench.synthetic import GRID, GRID_SLASH, LOCAL, VERTICAL_SLASH, HeadStructure, synthetic_qkv, video_prompt
from mmi_jax.bench.timing.measurements import chosen, rate, tile_flops
from mmi_jax.bench.timing.wall_time import Program, compile_programs
from mmi_jax.method.attention import permute, undo
from mmi_jax.method.dispatch import attend_sparsely
from mmi_jax.method.patterns import AShape, Boundary2D, Dense, Grid, Pattern, QBoundary, VerticalSlash
from mmi_jax.method.plan import batch_geometry, plan_batch
from mmi_jax.method.tables.cost_model import costs_of_device, faster_patterns
from mmi_jax.method.token_groups import FramePlace
from pallas_kernels.attention.api import Implementation, attend_inputs
from pallas_kernels.block_lists.block_sizes import Blocks

_FRAME = (FramePlace(),)

WHOLE_LIMIT = 0.1
"""Relative difference of the whole from its parts above which one is wrong; the parts are checked against float64.

In another program the estimate's sums round in another way, so a tie may select other blocks of negligible weight.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCase:
    """A pattern for each third of the heads, and the structure of its synthetic heads."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSizes:
    """The prompt and the heads a plan is timed on; lengths in tokens."""

    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self):
        """Raises ValueError for heads that do not divide."""
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"query heads must be a multiple of kv heads, got {self.num_q_heads}/{self.num_kv_heads}")

    @property
    def label(self) -> str:
        """Heads and tokens, as in "28/4 131072"."""
        return f"{self.num_q_heads}/{self.num_kv_heads} {self.num_tokens}"

    def astuple(self) -> tuple[int, int, int, int, str]:
        """Tokens, query heads, kv heads, head dim, element type."""
        return self.num_tokens, self.num_q_heads, self.num_kv_heads, self.head_dim, self.dtype


def bench_plan(name: str, sizes: PlanSizes, *, implementation: Implementation | None, repeats: int) -> dict[str, Any]:
    """One plan case's figures on a video of 256-token frames with text before and after it.

    `median_ms` is the whole as one program, views included, and what counts: heads that the device's cost model finds
    slower run dense in it, as in `prefill`. The parts are separate programs, with the patterns of the case.

    Args:
      name: of `PLAN_CASES`.
      sizes: of prompt and heads.
      implementation: see `chosen` when None.
      repeats: measurements of each program.

    Raises:
      RuntimeError: sampled rows differ from float64 attention over the plan's own lists, or the whole from the parts.
    """
    implementation = chosen(implementation)
    patterns, structures = PLAN_CASES[name].per_head(sizes.num_q_heads)
    layout = jax.tree.map(jnp.asarray, video_prompt(sizes.num_tokens))
    q, k, v = (
        x[None]
        for x in synthetic_qkv(
            layout, structures, num_kv_heads=sizes.num_kv_heads, head_dim=sizes.head_dim, dtype=sizes.dtype
        )
    )
    chosen_patterns = faster_patterns(patterns, num_tokens=sizes.num_tokens, blocks=Blocks(), costs=costs_of_device())
    runs_dense = np.array([a != b for a, b in zip(patterns, chosen_patterns, strict=True)])
    programs = _programs(patterns, chosen_patterns, q, k, v, layout, implementation)
    parts, expected = _parts(programs, q, k, v, layout, repeats)
    whole = programs["whole"]
    out = whole(q, k, v, layout)[0]
    if not runs_dense.all():
        _check_same(np.asarray(out[expected["rows"]])[:, ~runs_dense], expected["out"][:, ~runs_dense])
    if runs_dense.any():
        dense = sample_dense(*(x[0].transpose(1, 0, 2) for x in (q, k, v)), scale=sizes.head_dim**-0.5)
        dense = dense.of_heads(np.flatnonzero(runs_dense))
        dense.check(np.asarray(out[dense.rows, dense.heads]), None, dtype=sizes.dtype)
    del out
    timing = whole.time(q, k, v, layout, repeats=repeats)
    overhead = 1 - parts["attend_ms"] / timing.median_ms
    return {
        "case": name,
        "implementation": implementation or "default",
        "tokens": sizes.num_tokens,
        "heads": f"{sizes.num_q_heads}/{sizes.num_kv_heads}",
        "head_dim": sizes.head_dim,
        "dtype": sizes.dtype,
        "dense_heads": int(runs_dense.sum()),
        **parts,
        **timing.figures(),
        "overhead_fraction": round(overhead, 4),
    }


def _programs(patterns, chosen_patterns, q, k, v, layout, implementation) -> dict[str, Program]:
    """The parts and the whole, compiled in parallel before anything is timed."""
    blocks, scale, num_tokens = Blocks(), q.shape[-1] ** -0.5, q.shape[1]

    def views(layout):
        return batch_geometry(layout, patterns, batch=1, num_queries=num_tokens, q_start=None, blocks=blocks)

    def plan(q, k, geometry):
        return plan_batch(patterns, q, k, geometry, scale=scale, blocks=blocks)

    def attend(inputs):
        return attend_inputs(inputs, implementation)

    def whole(q, k, v, layout):
        named = None if set(chosen_patterns) == {Dense()} else implementation
        return attend_sparsely(
            q,
            k,
            v,
            chosen_patterns,
            layout=layout,
            blocks=blocks,
            implementation=named,
            position_is_index=True,
            padding_is_finite=True,
        ).out

    move = functools.partial(permute, scale=scale)
    viewed = jax.eval_shape(views, layout)
    planned = jax.eval_shape(plan, q, k, viewed)
    inputs = jax.eval_shape(move, planned, q, k, v)
    attended = jax.eval_shape(attend, inputs)
    return compile_programs(
        {
            "whole": (whole, (q, k, v, layout)),
            "plan": (plan, (q, k, viewed)),
            "attend": (attend, (inputs,)),
            "permute": (move, (planned, q, k, v)),
            "undo": (undo, (planned, *attended)),
            "views": (views, (layout,)),
        }
    )


def _parts(programs: dict[str, Program], q, k, v, layout, repeats: int):
    """Errors, density and the median milliseconds of each part; and rows of the result, to hold the whole against.

    At a million tokens the permuted queries take 15 GB and the outputs as much: nothing is held longer than needed.
    """
    times: dict[str, float] = {}

    def timed(name, *args):
        times[f"{name}_ms"] = (timing := programs[name].time(*args, repeats=repeats)).median_ms
        return timing

    viewed = programs["views"](layout)
    planned = programs["plan"](q, k, viewed)
    inputs = programs["permute"](planned, q, k, v)
    expected = sample(inputs)
    out, lse = programs["attend"](inputs)
    errors = expected.check(expected.of(out), expected.of(lse), dtype=str(q.dtype))
    rows = np.unique(np.linspace(0, q.shape[1] - 1, 32).astype(int))
    result = np.asarray(programs["undo"](planned, out, lse)[0][0, rows])
    timed("views", layout)
    timed("plan", q, k, viewed)
    timed("undo", planned, out, lse)
    del out, lse
    flops = tile_flops(inputs)
    attend_rate = rate(flops, timed("attend", inputs))["tflops_per_s"]
    del inputs
    timed("permute", planned, q, k, v)
    density = float(jax.vmap(lambda plan: plan.density())(planned).mean())
    figures = {"density": round(density, 5), **errors, "flops": flops, "tflops_per_s": attend_rate}
    return figures | {name: round(ms, 3) for name, ms in times.items()}, {"rows": rows, "out": result}


def _check_same(whole: np.ndarray, parts: np.ndarray) -> None:
    """Raises RuntimeError unless the one program gives what its parts give."""
    whole, parts = whole.astype(np.float64), parts.astype(np.float64)
    error = float(np.linalg.norm(whole - parts) / np.linalg.norm(parts))
    if not error <= WHOLE_LIMIT:
        raise RuntimeError(f"the whole must equal its parts within {WHOLE_LIMIT}, got {error:.2e}")
