"""Results of `mmi bench` as tables: the columns of several benchmarks; times in milliseconds."""

from typing import Any

from rich.table import Table


def figures_table(result: dict[str, Any], *columns: str) -> Table:
    """An empty table under the machine's name; the first column is left-aligned."""
    where = result["machine"]
    title = f"{where['device']}, commit {where['commit']}, jax {where['jax']}, {where['date']}"
    title += f"; matmul {result['matmul_tflops_per_s']:.4g} TFLOP/s" if "matmul_tflops_per_s" in result else ""
    table = Table(title=title, title_justify="left")
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left", overflow="fold")
    return table


def measured_cases(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases that did not fail."""
    return [case for case in result["cases"] if "error" not in case]


def kernel_cells(figures: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Errors, times, rate and fraction of the matmul rate; blank where there is none."""
    errors = [f"{figures[name]:.1e}" if name in figures else "" for name in ("relative_error", "lse_error")]
    if "median_ms" not in figures:
        return [*errors, "", "", ""]
    fraction = figures["tflops_per_s"] / result["matmul_tflops_per_s"]
    return [*errors, spread(figures), f"{figures['tflops_per_s']:.4g}", f"{fraction:.0%}"]


def spread(figures: dict[str, Any]) -> str:
    """Median, fastest and slowest milliseconds."""
    return f"{figures['median_ms']:.4g} ({figures['fastest_ms']:.4g}, {figures['slowest_ms']:.4g})"
