"""The runner of a benchmark's cases: a failure is the case's result, figures are written as they come."""

import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import RenderableType

from mmi_jax.bench.timing.machine import machine
from mmi_jax.bench.timing.measurements import reason
from mmi_jax.bench.timing.wall_time import matmul_tflops_per_s
from mmi_jax.cli.console import stderr_console, stdout_console
from mmi_jax.files import check_target, write_whole

FILE_WIDTH = 180
"""Columns of a table that goes to a file or a pipe."""


@dataclasses.dataclass(frozen=True)
class Case[T]:
    """One case: its name, and what is passed on to measure it."""

    name: str
    argument: T


def run_cases[T](
    cases: Sequence[Case[T]],
    measure: Callable[[T], dict[str, Any]],
    table: Callable[[dict[str, Any]], RenderableType],
    json_file: Path | None,
    *,
    stops_at_error: bool,
    times_matmul: bool = True,
) -> None:
    """Measures every case, prints a table and, last, one JSON line.

    Args:
      cases: in order.
      measure: the figures of one case.
      table: of the whole result.
      json_file: also holds the line, rewritten after every case so that an interrupted run keeps its figures.
      stops_at_error: lets the first error through.
      times_matmul: measures the rate of a matrix product first, that the cases' rates are compared with.

    Raises:
      ValueError: `json_file` cannot be written; before anything is measured.
      typer.Exit: status 1 when a case failed; the others are measured all the same.
    """
    if json_file is not None:
        check_target(json_file)
    matmul = {"matmul_tflops_per_s": round(matmul_tflops_per_s(), 2)} if times_matmul else {}
    result: dict[str, Any] = {"machine": machine(), **matmul, "cases": []}
    for case in cases:
        result["cases"].append(figures := _figures(case, measure, stops_at_error))
        stderr_console().print(_progress(case.name, figures), markup=False, soft_wrap=True)
        if json_file is not None:
            write_whole(json_file, json.dumps(result) + "\n")
        gc.collect()  # what a case held on the device is free before the next one begins
    console = stdout_console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(table(result))
    failed = [figures for figures in result["cases"] if "error" in figures]
    for figures in failed:
        console.print(f"{figures['case']}: failed: {figures['error']}", markup=False, soft_wrap=True)
    print(json.dumps(result))
    if failed:
        raise typer.Exit(1)


def _figures[T](case: Case[T], measure: Callable[[T], dict[str, Any]], stops_at_error: bool) -> dict[str, Any]:
    try:
        return measure(case.argument)
    except Exception as error:  # a case that fails must not cost the others their time on a rented machine
        if stops_at_error:
            raise
        return {"case": case.name, "error": reason(error)}


def _progress(name: str, figures: dict[str, Any]) -> str:
    if "error" in figures:
        return f"{name}: failed: {figures['error']}"
    time = f", {figures['median_ms']:.4g} ms" if "median_ms" in figures else ""
    rate = f", {figures['tflops_per_s']:.4g} TFLOP/s" if "tflops_per_s" in figures else ""
    error = f", relative error {figures['relative_error']:.1e}" if "relative_error" in figures else ""
    return f"{name}: measured{error}{time}{rate}"


def in_new_process(arguments: list[str]) -> Callable[[str], dict[str, Any]]:
    """Measures one case in a fresh interpreter: `mmi bench` with these arguments and the case's name."""

    def measure(name: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "mmi_jax.cli", "bench", *arguments, "--case", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        if not lines:
            raise RuntimeError(f"status {done.returncode}: {done.stderr[-500:]}")
        return json.loads(lines[-1])["cases"][0]

    return measure
