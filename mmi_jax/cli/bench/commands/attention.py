"""`mmi bench attention`: the block-sparse kernel on named cases, compared with dense attention and peers."""

from typing import Annotated, Any, get_args

import jax
import typer
from rich.table import Table

from mmi_jax.bench.attention import bench_attention
from mmi_jax.bench.baselines.dense_attention import dense_fits
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
)
from mmi_jax.cli.bench.runner import Case, in_new_process, run_cases
from mmi_jax.cli.bench.tables import figures_table, kernel_cells, measured_cases
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import ALONE, WITH_TORCH, take_memory
from pallas_kernels.attention.api import Implementation
from pallas_kernels.attention.cases import CASES


def attention(
    case: CaseOption = None,
    implementation: ImplementationOption = None,
    repeats: RepeatsOption = 5,
    baseline: BaselineOption = True,
    peers: PeersOption = False,
    dense_limit: DenseLimitOption = 2**18,
    isolate: Annotated[
        bool | None, typer.Option(help="Run each case in its own process, for its peak memory. Default: on a CPU.")
    ] = None,
    json_file: JsonFileOption = None,
    debug: StopOption = False,
) -> None:
    """Time block-sparse attention over given block lists. By default the cases that suit the device."""

    def measure(name: str) -> dict[str, Any]:
        case = CASES[name]
        is_short = case.num_tokens <= dense_limit
        return bench_attention(
            case,
            implementation=implementation,  # pyright: ignore
            with_dense=baseline and is_short and dense_fits(case.num_q_heads, case.num_tokens),
            with_peers=peers and is_short,
            repeats=repeats,
        )

    with one_line_errors(shows_traceback=debug):
        check_known("--implementation", implementation, get_args(Implementation))
        take_memory(WITH_TORCH if peers else ALONE)
        on_cpu = jax.default_backend() == "cpu"
        names = matching_cases(case, list(CASES), [n for n in CASES if n.startswith("cpu") == on_cpu])
        flags = ["--baseline" if baseline else "--no-baseline", *(["--peers"] if peers else [])]
        flags += ["--implementation", implementation] if implementation else []
        flags += ["--dense-limit", str(dense_limit), "--repeats", str(repeats)]
        is_isolated = (on_cpu if isolate is None else isolate) and len(names) > 1
        each = in_new_process(["attention", *flags]) if is_isolated else measure
        run_cases([Case(name, name) for name in names], each, attention_table, json_file, stops_at_error=debug)


def attention_table(result: dict[str, Any]) -> Table:
    """Each case, then what it is compared with: speed-up is ours over the other."""
    columns = ("density", "rel. error", "lse error", "ms (fastest, slowest)", "TFLOP/s", "% of matmul", "peak GB")
    table = figures_table(result, "", *columns, "speed-up")
    for case in measured_cases(result):
        table.add_row(
            f"{case['case']}, {case['implementation']}" + ("" if case["is_bit_equal"] else ", NOT bit-equal"),
            f"{case['density']:.4f}",
            *kernel_cells(case, result),
            f"{case['max_rss_bytes'] / 1e9:.2f}" if "max_rss_bytes" in case else "",
        )
        for other in case["others"]:
            if "error" in other:
                table.add_row(f"  {other['name']}: {other['error']}")
                continue
            note = f", {other['note']}" if "note" in other else ""
            speedup = f"{other['speedup']:.2f} x" if "speedup" in other else ""
            table.add_row(f"  {other['name']}{note}", "", *kernel_cells(other, result), "", speedup)
    return table
