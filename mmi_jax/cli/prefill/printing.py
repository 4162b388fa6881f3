"""Results as tables."""

from collections import Counter

import numpy as np
from rich.console import Console
from rich.table import Table

from mmi_jax.cli.prefill.options import RunResult
from mmi_jax.engine.reporting.profiling import StageTimes
from mmi_jax.engine.reporting.report import Agreement, PrefillReport

HOST_STAGES = (
    "Without an accelerator these are seconds of the host's threads, several of which run at once, and "
    "time without a kernel is not known."
)

LAYERS_TITLE = "min / mean / max over heads\ndensity: tiles computed, over causal's; above 1 in short prompts"


def print_result(result: RunResult, console: Console) -> None:
    """All results of a prefill, the answer last."""
    report = result.report
    console.print(prompt_table(report))
    console.print(seconds_table(report, result.dense_report))
    if result.stages is not None:
        console.print(stages_table(result.stages))
        if not result.stages.is_device:
            console.print(HOST_STAGES, style="dim", soft_wrap=True)
        console.print(f"trace in {result.stages.directory}", markup=False, soft_wrap=True)
    console.print(layers_table(report))
    for pattern in dict.fromkeys(sum(report.table.layers, ())):
        console.print(f"  {pattern}", style="dim", soft_wrap=True, markup=False)
    if result.agreement is not None:
        console.print(agreement_table(result.agreement))
    for path in result.pictures:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    if result.note:
        console.print(result.note, style="yellow", soft_wrap=True)
    if result.right_answer is not None:
        console.print(f"question: {result.options.text!r}", markup=False, soft_wrap=True)
    console.print(f"answer: {result.text!r}", markup=False, soft_wrap=True)
    if result.right_answer is not None:
        console.print(f"right answer: {result.right_answer!r}", markup=False, soft_wrap=True)


def prompt_table(report: PrefillReport) -> Table:
    """Tokens of each modality."""
    table = _table("prompt", "tokens")
    for modality, count in report.tokens.items():
        table.add_row(modality, f"{count:,}")
    table.add_row("all", f"{sum(report.tokens.values()):,}", style="bold")
    table.add_row("padded to", f"{report.padded_tokens:,}", style="dim")
    return table


def seconds_table(report: PrefillReport, dense: PrefillReport | None) -> Table:
    """Wall time of each stage; and of the dense prefill it is compared with."""
    table = _table("stage", "seconds", *(["dense"] if dense else []))
    for stage, seconds in report.seconds.items():
        other = [f"{dense.seconds[stage]:.2f}" if stage in dense.seconds else ""] if dense else []
        table.add_row(stage, f"{seconds:.2f}", *other)
    return table


def stages_table(stages: StageTimes) -> Table:
    """Device time of each stage of the prefill, from the trace."""
    table = _table("stage, by the profiler", "seconds", "fraction")
    total = sum(stages.seconds.values()) or 1.0
    for name, seconds in stages.seconds.items():
        table.add_row(name, f"{seconds:.4f}", f"{seconds / total:.1%}")
    if stages.is_device:
        table.add_row("no kernel running", f"{stages.idle:.4f}", "", style="dim")
    return table


def layers_table(report: PrefillReport) -> Table:
    """Patterns, density and estimated recall of each layer; min, mean, max over its heads."""
    table = _table("layer", "patterns", "density", "estimated recall", title=LAYERS_TITLE)
    for n, heads in enumerate(report.table.layers):
        counts = Counter(type(pattern).__name__ for pattern in heads)
        patterns = ", ".join(f"{name} x {count}" for name, count in counts.items())
        table.add_row(str(n), patterns, _spread(report.density[n]), _spread(report.recall[n]))
    table.add_row("all", "", _spread(report.density), _spread(report.recall), style="bold")
    return table


def agreement_table(agreement: Agreement) -> Table:
    """How close the sparse result is to the dense one."""
    table = _table("agreement with dense", "")
    table.add_row("same next token", "yes" if agreement.same_next_token == 1 else "no")
    table.add_row("top-5 overlap", f"{agreement.top5_overlap:.0%}")
    table.add_row("KL divergence", f"{agreement.kl:.2e} nats")
    table.add_row("relative error of the last hidden state", f"{agreement.hidden_error:.2e}")
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="dim")
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 or column == "patterns" else "right")
    return table


def _spread(values: np.ndarray) -> str:
    if np.isnan(values).all():
        return "not measured"
    return f"{np.nanmin(values):.2f} / {np.nanmean(values):.2f} / {np.nanmax(values):.2f}"
