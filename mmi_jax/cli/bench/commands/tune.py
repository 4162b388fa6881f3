"""`mmi bench tune`: a search of the Hopper kernel's configs."""

from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.table import Table

from mmi_jax.bench.tune import TuneProblem
from mmi_jax.bench.tuned_table import check_table, tune_and_save
from mmi_jax.cli.bench.options import JsonFileOption, RepeatsOption, StopOption, parse_heads
from mmi_jax.cli.bench.runner import Case, run_cases
from mmi_jax.cli.bench.tables import figures_table, measured_cases
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import ALONE, take_memory
from pallas_kernels.attention.hopper import gpu_tuned
from pallas_kernels.device import has_hopper_gpu

RANKS = 10
"""Configs of a search that its table shows, the best first; those that failed come after them."""

LISTS = ("random", "short", "all")


def tune_command(
    head_dim: Annotated[
        list[int] | None, typer.Option(help="Head dimension of the kernel; repeatable. Default: 64, 128 and 256.")
    ] = None,
    heads: Annotated[
        list[str] | None, typer.Option(help="Query and kv heads; repeatable. Default: 28/4 and 32/8.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1024, help="Tokens of the prompt.")] = 2**15,
    block_kv: Annotated[int, typer.Option(min=64, help="Tokens of a kv block.")] = 128,
    repeats: RepeatsOption = 5,
    table: Annotated[
        Path, typer.Option(help="Table that the best configs are written to, after every problem.")
    ] = gpu_tuned.PATH,
    json_file: JsonFileOption = None,
    debug: StopOption = False,
) -> None:
    """Search the Hopper kernel's configs. Outputs are checked, the ranking printed, the best saved in a table."""

    def measure(problem: TuneProblem) -> dict[str, Any]:
        return tune_and_save(problem, table, repeats=repeats)

    with one_line_errors(shows_traceback=debug):
        take_memory(ALONE)
        if not has_hopper_gpu():
            raise NotImplementedError(f"tune needs a GPU of compute capability 9.x, got {jax.default_backend()=}")
        check_table(table)
        problems = [
            TuneProblem(
                head_dim=dim, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, num_tokens=tokens, block_kv=block_kv
            )
            for dim in head_dim or (64, 128, 256)
            for num_q_heads, num_kv_heads in map(parse_heads, heads or ["28/4", "32/8"])
        ]
        cases = [Case(problem.label, problem) for problem in problems]
        run_cases(cases, measure, tune_table, json_file, stops_at_error=debug)


def tune_table(result: dict[str, Any]) -> Table:
    """The best configs of each problem, and those that were wrong or could not run."""
    cases = measured_cases(result)
    fields = list(cases[0]["ranking"][0]["config"]) if cases else []
    table = figures_table(result, "", *fields, *(f"{name} TFLOP/s" for name in LISTS))
    for case in cases:
        able = [entry for entry in case["ranking"] if "error" not in entry]
        failed = [entry for entry in case["ranking"] if "error" in entry]
        for entry in able[:RANKS] + failed:
            rates = (f"{entry['tflops_per_s'][name]:.4g}" if name in entry["tflops_per_s"] else "" for name in LISTS)
            why = f": {entry['error']}" if "error" in entry else ""
            table.add_row(f"{case['case']}{why}", *(str(entry["config"][name]) for name in fields), *rates)
    return table
