"""`mmi bench plans`: plans on synthetic heads, stage by stage and as one program, compared with dense attention."""

from typing import Annotated, Any, get_args

import jax
import typer
from rich.table import Table

from mmi_jax.bench.baselines.dense_attention import best_dense, dense_fits
from mmi_jax.bench.checks.sampled_rows import ERROR_LIMIT
from mmi_jax.bench.plans import PLAN_CASES, PlanSizes, bench_plan
from mmi_jax.cli.bench.options import (
    BaselineOption,
    CaseOption,
    DenseLimitOption,
    ImplementationOption,
    JsonFileOption,
    PeersOption,
    RepeatsOption,
    StopOption,
    check_known,
    matching_cases,
    parse_heads,
)
from mmi_jax.cli.bench.runner import Case, run_cases
from mmi_jax.cli.bench.tables import figures_table, measured_cases, spread
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import ALONE, WITH_TORCH, take_memory
from pallas_kernels.attention.api import Implementation

STAGES = ("views_ms", "plan_ms", "permute_ms", "attend_ms", "undo_ms")


def plans(
    case: CaseOption = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1024, help="Tokens of the prompt; repeatable. Default: 128K on a GPU, 8K.")
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(help="Query and kv heads, as in 28/4; repeatable. Default: 28/4 on a GPU, else 4/2."),
    ] = None,
    head_dim: Annotated[int | None, typer.Option(min=64, help="Default: 128 on a GPU, else 64.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 on a GPU, else float32.")
    ] = None,
    implementation: ImplementationOption = None,
    repeats: RepeatsOption = 5,
    baseline: BaselineOption = True,
    peers: PeersOption = False,
    dense_limit: DenseLimitOption = 2**17,
    json_file: JsonFileOption = None,
    debug: StopOption = False,
) -> None:
    """Time whole plans on a video with synthetic heads. Each stage, all as one program, and dense attention.

    Above --dense-limit the dense time is extrapolated by the square of the tokens, and labelled so.
    """

    def measure(argument: tuple[str, PlanSizes]) -> dict[str, Any]:
        name, sizes = argument
        dense = {}
        if baseline and dense_fits(sizes.num_q_heads, sizes.num_tokens):
            dense = best_dense(*sizes.astuple(), limit=dense_limit, repeats=min(repeats, 3), with_peers=peers)
        figures = bench_plan(name, sizes, implementation=implementation, repeats=repeats) | dense  # pyright: ignore
        speedup = {"speedup": round(dense["dense_ms"] / figures["median_ms"], 3)} if "dense_ms" in dense else {}
        return figures | speedup

    with one_line_errors(shows_traceback=debug):
        check_known("--dtype", dtype, ERROR_LIMIT)
        check_known("--implementation", implementation, get_args(Implementation))
        take_memory(WITH_TORCH if peers else ALONE)
        names = matching_cases(case, list(PLAN_CASES), list(PLAN_CASES))
        cases = [
            Case(f"{name} {sizes.label}", (name, sizes))
            for sizes in plan_sizes(tokens, heads, head_dim, dtype)
            for name in names
        ]
        run_cases(cases, measure, plans_table, json_file, stops_at_error=debug)


def plan_sizes(
    tokens: list[int] | None, heads: list[str] | None, head_dim: int | None, dtype: str | None
) -> list[PlanSizes]:
    """Every length with every number of heads; what is not given has the device's default."""
    on_gpu = jax.default_backend() == "gpu"
    return [
        PlanSizes(
            num_tokens=num_tokens,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim or (128 if on_gpu else 64),
            dtype=dtype or ("bfloat16" if on_gpu else "float32"),
        )
        for num_tokens in tokens or [2**17 if on_gpu else 8192]
        for num_q_heads, num_kv_heads in map(parse_heads, heads or ["28/4" if on_gpu else "4/2"])
    ]


def plans_table(result: dict[str, Any]) -> Table:
    """Stages, their sum and the whole of each plan; dense attention, with ~ where it is extrapolated."""
    stages = [name.removesuffix("_ms") for name in STAGES]
    whole = ("sum", "whole (fastest, slowest)", "heads run dense", "overhead", "attend TFLOP/s", "dense", "speed-up")
    table = figures_table(result, "", "tokens", "heads", "density", "rel. error", *stages, *whole)
    for case in measured_cases(result):
        dense = f"{'~' if case['is_dense_extrapolated'] else ''}{case['dense_ms']:.4g}" if "dense_ms" in case else ""
        table.add_row(
            case["case"],
            f"{case['tokens']:,}",
            case["heads"],
            f"{case['density']:.4f}",
            f"{case['relative_error']:.1e}",
            *(f"{case[name]:.4g}" for name in STAGES),
            f"{sum(case[name] for name in STAGES):.4g}",
            spread(case),
            str(case["dense_heads"]),
            f"{case['overhead_fraction']:.0%}",
            f"{case['tflops_per_s']:.4g}",
            dense,
            f"{case['speedup']:.2f} x" if "speedup" in case else case.get("dense_error", ""),
        )
    return table
