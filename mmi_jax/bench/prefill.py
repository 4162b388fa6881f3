"""Figures of whole prefills: the engine with a table, compared with the device's own dense attention."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmi_jax.bench.checks import masked_attention
from mmi_jax.bench.checks.sampled_rows import ERROR_LIMIT
from mmi_jax.bench.plans import PLAN_CASES
from mmi_jax.bench.timing.measurements import reason
from mmi_jax.engine.memory.memory_plan import memory_request, plan_memory
from mmi_jax.engine.prefill import prefill
from mmi_jax.engine.programs.chunk_inputs import ChunkInputs
from mmi_jax.engine.programs.compilation import program_texts
from mmi_jax.engine.programs.layer_program import Program
from mmi_jax.engine.protocols import ModelConfig, Prompt, VisionLanguageModel
from mmi_jax.engine.reporting.profiling import StageTimes, profiled
from mmi_jax.engine.reporting.report import PrefillReport
from mmi_jax.engine.settings.options import PrefillOptions
from mmi_jax.engine.settings.request import request_for
from mmi_jax.engine.warmup import chunk_shapes
from mmi_jax.method.dispatch import VENDOR, Vendor
from mmi_jax.method.patterns import Dense
from mmi_jax.method.tables.pattern_table import PatternTable
from pallas_kernels.attention.api import Backend

MIX = PLAN_CASES["mix"]
"""The table of the measurements: a third of every layer's heads each."""

NUM_CHECKED = 64
"""Places of the prompt whose logits are compared before anything is timed."""


LONG_SECONDS = 10.0
"""A dense prefill that takes longer is run once."""


def mixed_table(num_layers: int, num_heads: int, cases: Sequence[str] = ("mix",)) -> PatternTable:
    """The patterns of these `PLAN_CASES` in all layers, in equal runs of heads."""
    patterns = [pattern for case in cases for pattern in PLAN_CASES[case].patterns]
    row = tuple(patterns[n * len(patterns) // num_heads] for n in range(num_heads))
    return PatternTable(layers=(row,) * num_layers, model="+".join(cases))


def check_kernel(
    model: VisionLanguageModel, prompt: Prompt, table: PatternTable, *, dtype: str
) -> dict[str, int | float]:
    """The error of logits all over the prompt against the same engine with masked dense attention of the same plans.

    It is compared with what rounding alone makes: the error of the device's own dense attention against masked dense
    attention of a plan that leaves nothing out; and how far our logits are from those of dense attention.

    Args:
      model: of one layer: a second one would plan from inputs that are rounded in another way.

    Raises:
      RuntimeError: the error exceeds what rounding explains: a wrong result is not timed.
    """
    num_tokens = prompt.tokens.shape[1]
    at = np.unique(np.linspace(0, num_tokens - 1, NUM_CHECKED).astype(int))[None]

    def logits(table: PatternTable | None, implementation: Backend | Vendor | None) -> np.ndarray:
        options = PrefillOptions(table=table, implementation=implementation, may_run_dense=False, measures_recall=False)
        return np.asarray(prefill(model, prompt, options=options, logits_at=at).logits_at, np.float64)

    def error(ours: np.ndarray, theirs: np.ndarray) -> float:
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    ours, theirs, dense = logits(table, None), logits(table, masked_attention.attend), logits(None, VENDOR)
    if not (relative_error := error(ours, theirs)) <= ERROR_LIMIT[dtype]:
        raise RuntimeError(
            f"logits must equal masked dense attention's within {ERROR_LIMIT[dtype]}, got {relative_error:.2e}"
        )
    return {
        "tokens": num_tokens,
        "relative_error": relative_error,
        "relative_error_of_dense": error(dense, logits(None, masked_attention.attend)),
        "relative_difference_from_dense": error(ours, dense),
    }


def bench_prefill(model: VisionLanguageModel, prompt: Prompt, table: PatternTable, *, repeats: int) -> dict[str, Any]:
    """Figures of prefills of one prompt from its embeddings on.

    The first run compiles, `repeats` more are timed. No result outlives its run.
    """
    figures, report = _first_run(model, prompt, table)
    options = PrefillOptions(table=table, measures_recall=False)
    times = [_seconds(model, prompt, options)[0] for _ in range(repeats)]
    return figures | {
        "seconds": round(statistics.median(times), 4),
        "fastest_seconds": round(min(times), 4),
        "slowest_seconds": round(max(times), 4),
        "median_ms": round(1e3 * statistics.median(times), 3),
        **_densities(report),
        **memory_figures(model, table, prompt.tokens.shape[1]),
    }


def _first_run(model: VisionLanguageModel, prompt: Prompt, table: PatternTable) -> tuple[dict[str, Any], PrefillReport]:
    _, report = _seconds(model, prompt, PrefillOptions(table=table, measures_recall=False))
    figures = {
        "tokens": prompt.tokens.shape[1],
        "padded_tokens": report.padded_tokens,
        "layers": table.num_layers,
        "compile_seconds": round(report.seconds["compile"], 3),
    }
    return figures, report


def prefill_program(
    model: VisionLanguageModel, table: PatternTable, num_tokens: int
) -> tuple[Program, ChunkInputs[jax.ShapeDtypeStruct]]:
    """The program of `bench_prefill`, and what `compiled_chunk` takes of shapes; the model may be shapes, too."""
    request = request_for(model.config, num_tokens, PrefillOptions(table=table, measures_recall=False))
    return request.program(model, position_is_index=True), chunk_shapes(model, request)


def profile_stages(model: VisionLanguageModel, prompt: Prompt, table: PatternTable, directory: Path) -> StageTimes:
    """Device time of the stages of one prefill whose programs are compiled."""
    run = functools.partial(prefill, model, prompt, table=table, measures_recall=False)
    return profiled(lambda: run().hidden, directory, program_texts)[1]


def dense_seconds(model: VisionLanguageModel, prompt: Prompt) -> float:
    """Seconds of one prefill with the device's own dense attention, the second one unless the first takes long.

    Compilation is not in it, and what else a first run pays is lost in a long one.
    """
    options = PrefillOptions(implementation=VENDOR, may_run_dense=False, measures_recall=False)
    seconds, _ = _seconds(model, prompt, options)
    return seconds if seconds > LONG_SECONDS else _seconds(model, prompt, options)[0]


def _seconds(model: VisionLanguageModel, prompt: Prompt, options: PrefillOptions) -> tuple[float, PrefillReport]:
    """Seconds from the embeddings to the last layer, host work between them included, and the report."""
    report = prefill(model, prompt, options=options).report
    return report.seconds["prefill"], report


def _densities(report: PrefillReport) -> dict[str, Any]:
    """Mean density, and that of the heads of each pattern that ran."""
    names = np.array(
        [[type(p).__name__ + ("+slash" if p == MIX.patterns[1] else "") for p in row] for row in report.table.layers]
    )
    by_pattern = {str(name): round(float(report.density[names == name].mean()), 5) for name in np.unique(names)}
    return {"density": round(float(report.density.mean()), 5), "density_by_pattern": by_pattern}


def memory_figures(
    model: VisionLanguageModel, table: PatternTable, num_tokens: int, *, embed_bytes: int = 0
) -> dict[str, int]:
    """Bytes that the planner predicts, and the most that was allocated so far, where the device reports it."""
    request = request_for(model.config, num_tokens, PrefillOptions(table=table, may_run_dense=False))
    stats = jax.devices()[0].memory_stats() or {}
    measured = {"peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}
    return {"planned_bytes": plan_memory(memory_request(request, model, embed_bytes=embed_bytes)).peak, **measured}


@dataclasses.dataclass
class DenseBaseline:
    """Seconds of dense prefills: measured up to a limit, extrapolated above it.

    All but attention is linear in the tokens and attention quadratic, so two measurements give both.

    Args:
      measure: seconds of a dense prefill of so many tokens.
      limit: tokens that are measured at most.
    """

    measure: Callable[[int], float]
    limit: int
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    def of(self, num_tokens: int) -> dict[str, Any]:
        """Figures that ours are compared with."""
        try:
            if num_tokens <= self.limit:
                return {"dense_seconds": round(self._measured(num_tokens), 4), "is_dense_extrapolated": False}
            longer, shorter = self._measured(self.limit), self._measured(self.limit // 2)
        except Exception as error:  # a baseline that fails must not cost the other figures
            return {"dense_error": reason(error)}
        quadratic = (longer - 2 * shorter) / (self.limit**2 / 2)
        linear = (longer - quadratic * self.limit**2) / self.limit
        return {
            "dense_seconds": round(linear * num_tokens + quadratic * num_tokens**2, 3),
            "is_dense_extrapolated": True,
            "dense_measured_at": [self.limit // 2, self.limit],
        }

    def _measured(self, num_tokens: int) -> float:
        if num_tokens not in self.seconds:
            self.seconds[num_tokens] = self.measure(num_tokens)
        return self.seconds[num_tokens]


def projection_flops(config: ModelConfig, num_tokens: int) -> float:
    """Floating-point operations of all projections and MLPs; attention and the head apart."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_token = config.embed_dim * (2 * q + 2 * kv + 3 * config.mlp_dim)
    return 2.0 * config.num_layers * num_tokens * per_token


def is_all_dense(table: PatternTable) -> bool:
    """Whether nothing is left out."""
    return all(pattern == Dense() for row in table.layers for pattern in row)
