"""The table of tuned kernel configs: the best of each search goes into it."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmi_jax.bench.timing.machine import machine
from mmi_jax.bench.timing.measurements import reason
from mmi_jax.bench.tune import TuneProblem, tune
from mmi_jax.files import check_target, write_whole
from pallas_kernels.attention.hopper.gpu_config import HopperConfig
from pallas_kernels.attention.hopper.gpu_tuned import VERSION, TunedEntry, read_table


def tuned_entry(problem: TuneProblem, ranking: list[dict[str, Any]]) -> TunedEntry:
    """The table's entry for the first of a ranking."""
    where = machine()
    return TunedEntry(
        head_dim=problem.head_dim,
        block_kv=64 if problem.block_kv % 128 else 128,
        heads_per_kv_head=problem.num_q_heads // problem.num_kv_heads,
        config=HopperConfig(**ranking[0]["config"]),
        tflops_per_s=ranking[0]["tflops_per_s"],
        device=where["device"],
        date=where["date"],
        commit=where["commit"],
    )


def check_table(path: Path) -> None:
    """Raises ValueError for a table that `put_entry` could not write or read: before a search, not after it."""
    check_target(path)
    if path.exists():
        read_table(path)


def tune_and_save(problem: TuneProblem, table: Path, *, repeats: int) -> dict[str, Any]:
    """The figures of `tune`, the best of them saved in the table; `error` says why where it could not be."""
    figures = tune(problem, repeats=repeats)
    try:
        put_entry(table, tuned_entry(problem, figures["ranking"]))
    except Exception as error:  # the search took long: its ranking must not be lost with the table
        figures["error"] = f"measured, but not saved in {table}: {reason(error)}"
    return figures


def put_entry(path: Path, new: TunedEntry) -> None:
    """Writes the entry into the table, in place of the one for the same kind of problem."""
    old = read_table(path) if path.exists() else ()
    write_table(path, [*(entry for entry in old if entry.key != new.key), new])


def write_table(path: Path, entries: Iterable[TunedEntry]) -> None:
    """Writes the entries, one a line, sorted, in one step."""
    lines = [json.dumps(dataclasses.asdict(entry)) for entry in sorted(entries, key=lambda entry: entry.key)]
    text = f'{{"version": {VERSION}, "entries": [\n  ' + ",\n  ".join(lines) + "\n]}\n"
    write_whole(path, text)
