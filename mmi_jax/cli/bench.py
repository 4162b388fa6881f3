"""`mmi bench`: attention cases and whole plans, timed beside dense attention."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.table import Table

from mmi_jax.bench import bench_attention, machine
from mmi_jax.bench_plans import PLAN_CASES, bench_plan
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.console import spinner, stderr_console, stdout_console
from pallas_kernels.attention.cases import CASES

FILE_WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""

app = typer.Typer(name="bench", help="Time attention beside its dense baseline; outputs are checked first.")

CaseOption = Annotated[list[str] | None, typer.Option("--case", help="A case by name; may be repeated.")]
ImplementationOption = Annotated[
    str | None, typer.Option(help="Backend: reference, xla, ...; by default the first able one.")
]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Timed calls of each function.")]
BaselineOption = Annotated[bool, typer.Option(help="Also time dense attention, where it fits.")]
JsonFileOption = Annotated[Path | None, typer.Option(help="Also write the JSON line to this file.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
OwnProcessOption = Annotated[bool, typer.Option(help="A process for each case, so that its peak memory is its own.")]


@app.command()
def attention(
    case: CaseOption = None,
    implementation: ImplementationOption = None,
    repeats: RepeatsOption = 5,
    baseline: BaselineOption = True,
    own_process: OwnProcessOption = True,
    json_file: JsonFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Block-sparse attention over given lists. By default the cases that suit the device."""

    def run(name: str) -> dict[str, Any]:
        one = CASES[name]
        fits = baseline and _dense_fits(one.num_q_heads, one.num_tokens)
        return bench_attention(one, implementation=implementation, with_baseline=fits, repeats=repeats)  # pyright: ignore

    with one_line_errors(shows_traceback=debug):
        default = [n for n in CASES if n.startswith("cpu") == (jax.default_backend() != "gpu")]
        names = _chosen(case, CASES, default)
        arguments = ["attention", "--repeats", str(repeats), *_flags(implementation, baseline)]
        _bench(names, _in_own_process(arguments) if own_process and len(names) > 1 else run, json_file)


@app.command()
def plans(
    case: CaseOption = None,
    tokens: Annotated[int, typer.Option(min=1024, help="Tokens of the prompt.")] = 8192,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 2,
    head_dim: Annotated[int, typer.Option(min=64, help="Head dimension.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    implementation: ImplementationOption = None,
    repeats: RepeatsOption = 5,
    baseline: BaselineOption = True,
    json_file: JsonFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Real plans on a video with planted structure: plan, permute, attend and undo apart."""

    def run(name: str) -> dict[str, Any]:
        return bench_plan(
            name, num_tokens=tokens, num_q_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
            implementation=implementation, with_baseline=baseline and _dense_fits(heads, tokens), repeats=repeats,  # pyright: ignore
        )  # fmt: skip

    with one_line_errors(shows_traceback=debug):
        _bench(_chosen(case, PLAN_CASES, list(PLAN_CASES)), run, json_file)


def _chosen(asked: list[str] | None, known: dict[str, Any], default: list[str]) -> list[str]:
    if unknown := sorted(set(asked or ()) - set(known)):
        raise ValueError(f"unknown case {', '.join(unknown)}: known cases are {', '.join(known)}")
    return asked or default


def _bench(names: list[str], run: Callable[[str], dict[str, Any]], json_file: Path | None) -> None:
    """Runs the cases, prints a table and, last, one JSON line."""
    found = []
    for name in names:
        with spinner(name):
            found.append(run(name))
    console = stdout_console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(_table(found))
    line = json.dumps({"machine": machine(), "cases": found})
    if json_file is not None:
        with tempfile.NamedTemporaryFile("w", dir=json_file.parent, delete=False) as file:
            file.write(line + "\n")
        os.replace(file.name, json_file)
    print(line)


def _table(found: list[dict[str, Any]]) -> Table:
    """Times in milliseconds, median with the fastest and slowest call; and the parts of a plan."""
    parts = [name for name in ("plan_ms", "permute_ms", "attend_ms", "undo_ms") if name in found[0]]
    table = Table(title=f"{machine()['device']}, commit {machine()['commit']}", title_justify="left")
    for column in (
        "case",
        "density",
        "rel. error",
        "ms (fastest, slowest)",
        *parts,
        "TFLOP/s",
        "peak GB",
        "dense ms",
        "speed-up",
    ):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in found:
        table.add_row(
            f"{row['case']} {row['implementation']}",
            f"{row['density']:.4f}",
            f"{row['relative_error']:.1e}",
            f"{row['median_ms']:.1f} ({row['fastest_ms']:.1f}, {row['slowest_ms']:.1f})",
            *(f"{row[name]:.1f}" for name in parts),
            f"{row['tflops_per_s']:.3g}" if "tflops_per_s" in row else "",
            f"{row['max_rss_bytes'] / 1e9:.2f}" if "max_rss_bytes" in row else "",
            f"{row['baseline_median_ms']:.1f}"
            if "speedup" in row
            else "does not fit"
            if "max_rss_bytes" in row
            else "",
            f"{row['speedup']:.2f} x" if "speedup" in row else "",
        )
    return table


def _dense_fits(num_heads: int, num_tokens: int) -> bool:
    """Whether dense attention is worth trying: cuDNN needs no room, XLA holds all scores in float32."""
    if jax.default_backend() == "gpu":
        return True
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 3 * 4 * num_heads * num_tokens**2 < memory


def _flags(implementation: str | None, baseline: bool) -> list[str]:
    named = ["--implementation", implementation] if implementation else []
    return [*named, "--baseline" if baseline else "--no-baseline"]


def _in_own_process(arguments: list[str]) -> Callable[[str], dict[str, Any]]:
    """Runs one case in a fresh interpreter."""

    def run(name: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "mmi_jax.cli", "bench", *arguments, "--case", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            stderr_console().print(done.stderr, markup=False)
            raise ValueError(f"{name} failed with status {done.returncode}")
        return json.loads(done.stdout.strip().splitlines()[-1])["cases"][0]

    return run
