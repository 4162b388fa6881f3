"""Results of `mmi bench` as tables; times in milliseconds."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table

RANKS = 10
"""Configs of a search that its table shows, the best first; those that failed come after them."""

LISTS = ("random", "short", "all")
PLAN_PARTS = ("views_ms", "plan_ms", "permute_ms", "attend_ms", "undo_ms")


def attention_table(result: dict[str, Any]) -> Table:
    """Each case, then what was measured beside it: speed-up is ours over the other."""
    table = _table(
        result, "", "density", "rel. error", "lse error", "ms (fastest, slowest)", "TFLOP/s", "% of matmul", "peak GB",
        "speed-up",
    )  # fmt: skip
    for case in _measured_cases(result):
        table.add_row(
            f"{case['case']}, {case['implementation']}" + ("" if case["is_bit_equal"] else ", NOT bit-equal"),
            f"{case['density']:.4f}",
            *_measured(case, result),
            f"{case['max_rss_bytes'] / 1e9:.2f}" if "max_rss_bytes" in case else "",
        )
        for other in case["others"]:
            if "error" in other:
                table.add_row(f"  {other['name']}: {other['error']}")
                continue
            note = f", {other['note']}" if "note" in other else ""
            speedup = f"{other['speedup']:.2f} x" if "speedup" in other else ""
            table.add_row(f"  {other['name']}{note}", "", *_measured(other, result), "", speedup)
    return table


def plans_table(result: dict[str, Any]) -> Table:
    """Parts, their sum and the whole of each plan; dense attention, with ~ where it is extrapolated."""
    table = _table(
        result, "", "tokens", "heads", "density", "rel. error", *(name.removesuffix("_ms") for name in PLAN_PARTS),
        "sum", "whole (fastest, slowest)", "heads run dense", "beside attend", "attend TFLOP/s", "dense", "speed-up",
    )  # fmt: skip
    for case in _measured_cases(result):
        dense = f"{'~' if case['is_dense_extrapolated'] else ''}{case['dense_ms']:.4g}" if "dense_ms" in case else ""
        table.add_row(
            case["case"],
            f"{case['tokens']:,}",
            case["heads"],
            f"{case['density']:.4f}",
            f"{case['relative_error']:.1e}",
            *(f"{case[name]:.4g}" for name in PLAN_PARTS),
            f"{sum(case[name] for name in PLAN_PARTS):.4g}",
            _spread(case),
            str(case["dense_heads"]),
            f"{case['share_beside_attend']:.0%}",
            f"{case['tflops_per_s']:.4g}",
            dense,
            f"{case['speedup']:.2f} x" if "speedup" in case else case.get("dense_error", ""),
        )
    return table


def prefill_table(result: dict[str, Any]) -> Group:
    """Each length: ours, dense with ~ where it is extrapolated, memory planned and measured, then the peers; below the
    table the stages and the check.
    """
    table = _table(
        result, "", "tokens", "layers", "density", "s (fastest, slowest)", "dense s", "speed-up", "tokens/s",
        "projections at the matmul rate, s", "compile s", "planned GiB", "peak GiB",
    )  # fmt: skip
    for case in _measured_cases(result):
        dense = (
            f"{'~' if case['is_dense_extrapolated'] else ''}{case['dense_seconds']:.4g}" if "speedup" in case else ""
        )
        ideal = case["projection_flops"] / result["matmul_tflops_per_s"] / 1e12
        table.add_row(
            case["case"],
            f"{case['tokens']:,}",
            str(case["layers"]),
            f"{case['density']:.4f}",
            f"{case['seconds']:.4g} ({case['fastest_seconds']:.4g}, {case['slowest_seconds']:.4g})",
            dense or case.get("dense_error", ""),
            f"{case['speedup']:.2f} x" if "speedup" in case else "",
            f"{case['tokens'] / case['seconds']:,.0f}",
            f"{ideal:.4g}",
            f"{case['compile_seconds']:.1f}",
            f"{case['planned_bytes'] / 2**30:.2f}",
            f"{case['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in case else "",
        )
        for other in case["others"]:
            time = f"{other['seconds']:.4g}" if "seconds" in other else other["error"]
            peak = f"{other['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in other else ""
            table.add_row(f"  {other['name']}", "", "", "", time, *[""] * 6, peak)
    return Group(table, *(note for case in _measured_cases(result) for note in _prefill_notes(case)))


def _prefill_notes(case: dict[str, Any]) -> Iterator[str]:
    """Density by pattern, device time by stage, and the check, each on a line."""
    label = f"{case['case']} {case['tokens']:,}"
    yield f"{label}, density: " + ", ".join(f"{name} {x:.4f}" for name, x in case["density_by_pattern"].items())
    if "stages" in case:
        stages = case["stages"]["seconds"]
        yield f"{label}, stages: " + ", ".join(f"{name} {1e3 * seconds:.4g} ms" for name, seconds in stages.items())
    if "start" in case:
        yield f"{label}, start: " + (case["start"].get("error") or ", ".join(_starts(case["start"])))
    if "check" in case:
        check = case["check"]
        found = check.get("error") or (
            f"{check['tokens']:,} tokens, relative error {check['relative_error']:.1e} "
            f"(dense attention's own {check['relative_error_of_dense']:.1e})"
        )
        yield f"{label}, {check['name']}: {found}"


def _starts(start: dict[str, Any]) -> Iterator[str]:
    """Cold and warm, and how many programs of layers."""
    for name in ("cold", "warm"):
        times = start[f"{name}_start"]
        yield f"{name} {times['seconds']} s for {times['programs']} different layers"


def first_token_table(result: dict[str, Any]) -> Table:
    """The whole time of each length, its parts in order, and decoding and the tower each alone; dense as elsewhere."""
    parts = ("prompt", "vision", "prefill", "rest")
    table = _table(
        result, "", "tokens", "pictures", "whole, s", *parts, "waited", "decoding alone", "tower alone",
        "dense prefill", "dense whole", "speed-up", "ready s, all", "first s more", "peak GiB",
    )  # fmt: skip
    for case in _measured_cases(result):
        sign = "~" if case.get("is_dense_extrapolated") else ""
        dense = [f"{sign}{case[name]:.4g}" if name in case else "" for name in ("dense_seconds", "dense_first_token")]
        table.add_row(
            case["case"],
            f"{case['tokens']:,}",
            f"{case['pictures']:,}",
            f"{case['seconds']:.4g}",
            *(f"{case['parts'][name]:.4g}" for name in (*parts, "waited")),
            f"{case['decoding_alone']:.4g}",
            f"{case['tower_alone']:.4g}",
            *dense,
            f"{case['speedup']:.2f} x" if "speedup" in case else case.get("dense_error", ""),
            f"{case['ready']['seconds']:.1f}" if "seconds" in case["ready"] else case["ready"]["error"],
            f"{case['compile_seconds']:.1f}",
            f"{case['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in case else "",
        )
        for other in case["others"]:
            if "error" in other:
                table.add_row(f"  {other['name']}: {other['error']}")
            else:
                times = (f"{other['parts'][name]:.4g}" for name in parts)
                table.add_row(f"  {other['name']}", "", "", f"{other['seconds']:.4g}", *times)
    return table


def batch_table(result: dict[str, Any]) -> Table:
    """`prefill_many`, then the other ways: speed-up is ours over the other."""
    table = _table(
        result, "", "prompts", "tokens", "padded to", "logits differ", "s (fastest, slowest)", "tokens/s", "speed-up"
    )

    def times(figures: dict[str, Any], tokens: int) -> tuple[str, str]:
        spread = f"{figures['seconds']:.4g} ({figures['fastest_seconds']:.4g}, {figures['slowest_seconds']:.4g})"
        return spread, f"{tokens / figures['seconds']:,.0f}"

    for case in _measured_cases(result):
        prompts = f"{len(case['lengths'])} in {len(case['batches'])} batches"
        sizes = (f"{case[name]:,}" for name in ("tokens", "padded_tokens"))
        table.add_row(case["case"], prompts, *sizes, "", *times(case, case["tokens"]))
        for other in case["others"]:
            if "error" in other:
                table.add_row(f"  {other['name']}: {other['error']}")
                continue
            figures = (f"{other['padded_tokens']:,}", f"{other['logits_difference']:.1e}")
            table.add_row(
                f"  {other['name']}", "", "", *figures, *times(other, case["tokens"]), f"{other['speedup']:.2f} x"
            )
    return table


def decode_table(result: dict[str, Any]) -> Table:
    """Time of a token and the rate of reading, then what was measured beside it."""
    table = _table(
        result, "", "prompts", "rel. error", "logits differ", "ms per token", "tokens/s", "GB per token", "TB/s",
        "% of copy", "compile s",
    )  # fmt: skip
    for case in _measured_cases(result):
        table.add_row(
            case["case"],
            str(case["batch"]),
            f"{case['relative_error']:.1e}",
            f"{case['logits_difference']:.1e}",
            f"{case['ms_per_token']:.4g}",
            f"{case['tokens_per_s']:.4g}",
            f"{case['gb_per_token']:.4g}",
            f"{case['tb_per_s']:.4g}",
            f"{case['share_of_copy']:.0%} of {case['copy_tb_per_s']:.4g}",
            f"{case['compile_ms'] / 1e3:.1f}",
        )
        for other in case["others"]:
            what = f": {other['error']}" if "error" in other else ""
            ms = other.get("ms_per_token", other.get("median_ms"))
            rate = f"{other['tb_per_s']:.4g}" if "tb_per_s" in other else ""
            table.add_row(f"  {other['name']}{what}", "", "", "", f"{ms:.4g}" if ms else "", "", "", rate)
    return table


def vision_table(result: dict[str, Any]) -> Table:
    """The whole call from host memory, then one batch on the device."""
    table = _table(
        result, "", "frames", "rel. error (xla's)", "ms (fastest, slowest)", "TFLOP/s", "% of matmul", "frames/s",
        "tokens/s",
    )  # fmt: skip
    for case in _measured_cases(result):
        errors = f"{case['relative_error']:.1e} ({case['relative_error_xla']:.1e})"
        rates = f"{case['frames_per_s']:.4g}", f"{case['tokens_per_s']:.5g}"
        table.add_row(case["case"], str(case["frames"]), errors, *_measured(case, result)[2:], *rates)
        for other in case["others"]:
            if "error" in other:
                table.add_row(f"  {other['name']}: {other['error']}")
            else:
                table.add_row(f"  {other['name']}", str(other["frames"]), "", *_measured(other, result)[2:])
    return table


def soak_table(result: dict[str, Any]) -> Table:
    """What was made ready before, what grew while prompts went by, and what was compiled all the same."""
    table = _table(
        result, "", "prompts", "buckets", "programs", "ready s", "embeddings ready s", "all prompts s",
        "host MiB grown", "device MiB", "arrays MiB", "compiled",
    )  # fmt: skip
    for case in _measured_cases(result):
        grown = (f"{case[f'{name}_bytes_growth'] / 2**20:.1f}" for name in ("host", "device", "array"))
        sizes = (str(case[name]) for name in ("prompts", "buckets", "programs"))
        times = (f"{x:.4g}" for x in (case["ready"]["programs"], case["ready"]["embeddings"], case["seconds"]))
        table.add_row(case["case"], *sizes, *times, *grown, str(case["compilations"]))
    return table


def check_table(result: dict[str, Any]) -> Table:
    """Errors of each small problem."""
    table = _table(result, "", "rel. error", "lse error", "empty rows")
    for case in _measured_cases(result):
        errors = (f"{case[name]:.1e}" for name in ("relative_error", "lse_error"))
        table.add_row(case["case"], *errors, str(case["num_empty_rows"]))
    return table


def tune_table(result: dict[str, Any]) -> Table:
    """The best configs of each problem, and those that were wrong or could not run."""
    cases = _measured_cases(result)
    fields = list(cases[0]["ranking"][0]["config"]) if cases else []
    table = _table(result, "", *fields, "random TFLOP/s", "all TFLOP/s")
    for case in cases:
        able = [row for row in case["ranking"] if "error" not in row]
        failed = [row for row in case["ranking"] if "error" in row]
        for row in able[:RANKS] + failed:
            rates = (f"{row['tflops_per_s'][name]:.4g}" if name in row["tflops_per_s"] else "" for name in LISTS)
            why = f": {row['error']}" if "error" in row else ""
            table.add_row(f"{case['case']}{why}", *(str(row["config"][name]) for name in fields), *rates)
    return table


def _measured_cases(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases that did not fail."""
    return [case for case in result["cases"] if "error" not in case]


def _measured(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Errors, times, rate and share of the matmul rate; blank where a row has none."""
    errors = [f"{row[name]:.1e}" if name in row else "" for name in ("relative_error", "lse_error")]
    if "median_ms" not in row:
        return [*errors, "", "", ""]
    share = row["tflops_per_s"] / result["matmul_tflops_per_s"]
    return [*errors, _spread(row), f"{row['tflops_per_s']:.4g}", f"{share:.0%}"]


def _spread(row: dict[str, Any]) -> str:
    return f"{row['median_ms']:.4g} ({row['fastest_ms']:.4g}, {row['slowest_ms']:.4g})"


def _table(result: dict[str, Any], *columns: str) -> Table:
    where = result["machine"]
    title = f"{where['device']}, commit {where['commit']}, jax {where['jax']}, {where['date']}"
    title += f"; matmul {result['matmul_tflops_per_s']:.4g} TFLOP/s" if "matmul_tflops_per_s" in result else ""
    table = Table(title=title, title_justify="left")
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left", overflow="fold")
    return table
