"""`mmi bench check`: every rule of the kernel's contract against the reference."""

from typing import Any, get_args

from rich.table import Table

from mmi_jax.bench.checks.kernel_rules import RULE_CASES, check_rules
from mmi_jax.cli.bench.options import (
    CaseOption,
    ImplementationOption,
    JsonFileOption,
    StopOption,
    check_known,
    matching_cases,
)
from mmi_jax.cli.bench.runner import Case, run_cases
from mmi_jax.cli.bench.tables import figures_table, measured_cases
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import ALONE, take_memory
from pallas_kernels.attention.api import Implementation


def check(
    case: CaseOption = None,
    implementation: ImplementationOption = None,
    json_file: JsonFileOption = None,
    debug: StopOption = False,
) -> None:
    """Check every rule of the kernel against the reference. Problems are small, and nothing is timed."""

    def measure(name: str) -> dict[str, Any]:
        return check_rules(name, implementation=implementation)  # pyright: ignore

    with one_line_errors(shows_traceback=debug):
        check_known("--implementation", implementation, get_args(Implementation))
        take_memory(ALONE)
        cases = [Case(name, name) for name in matching_cases(case, list(RULE_CASES), list(RULE_CASES))]
        run_cases(cases, measure, check_table, json_file, stops_at_error=debug, times_matmul=False)


def check_table(result: dict[str, Any]) -> Table:
    """Errors of each small problem."""
    table = figures_table(result, "", "rel. error", "lse error", "empty rows")
    for case in measured_cases(result):
        errors = (f"{case[name]:.1e}" for name in ("relative_error", "lse_error"))
        table.add_row(case["case"], *errors, str(case["num_empty_rows"]))
    return table
