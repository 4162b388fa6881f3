"""`mmi aot`: a model's prefill compiled ahead of time for a TPU topology that is not attached."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mmi_jax.aot.bundles import dump_flags
from mmi_jax.cli.aot.options import AotOptions
from mmi_jax.cli.console import spinner, stdout_console
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.options import DebugOption, PatternOption, PatternTableOption
from mmi_jax.engine.settings.buckets import MAX_TOKENS, Buckets

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # no TPU is opened
    "TPU_SKIP_MDS_QUERY": "1",  # nor the metadata server of a TPU VM
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes may compile too
    "JAX_TRACEBACK_FILTERING": "off",  # so that the last line on stderr is the error's
}
DOES_NOT_FIT = 1
"""Exit status of a prompt that needs more memory than there is."""

GB = 10**9

TOKENS_HELP = (
    f"Tokens of the prompt. Default: 131,072, or with --longest {MAX_TOKENS:,}. Prefill itself takes prompts up to "
    f"its largest bucket: {MAX_TOKENS:,} tokens on several devices, {Buckets.largest:,} on one, unless it is given "
    "other buckets."
)


def aot(
    topology: Annotated[str, typer.Option(help="TPU topology: v5e:4x4, v5p:2x2x1, v6e:2x2, ...")],
    preset: Annotated[str, typer.Option(help="Model size: 3b, 7b, 32b, 72b of Qwen2.5-VL.")] = "7b",
    tokens: Annotated[int | None, typer.Option(min=1, help=TOKENS_HELP)] = None,
    table: PatternTableOption = None,
    pattern: PatternOption = None,
    longest: Annotated[bool, typer.Option("--longest", help="Find the longest prompt that fits.")] = False,
    layers: Annotated[int | None, typer.Option(help="Compile the first layers only.")] = None,
    block_q: Annotated[int, typer.Option(help="Queries of a tile.")] = 512,
    density: Annotated[
        float, typer.Option(help="Fraction of the causal tiles that dynamic patterns are assumed to visit.")
    ] = 0.05,
    measure_recall: Annotated[bool, typer.Option(help="Also compile the recall measurement of the report.")] = True,
    json_file: Annotated[Path | None, typer.Option(help="Also write the JSON line to this file.")] = None,
    debug: DebugOption = False,
) -> None:
    """Compile a prefill for a TPU topology that is not attached. Prints memory, kernel schedule, roofline bound."""
    with one_line_errors(shows_traceback=debug):
        if table is not None and pattern is not None:
            raise ValueError(f"--table and --pattern exclude each other: got {str(table)!r} and {pattern!r}")
        options = AotOptions(
            preset=preset,
            topology=topology,
            tokens=tokens or (MAX_TOKENS if longest else 2**17),
            table=None if table is None else str(table),
            pattern=pattern,
            layers=layers,
            block_q=block_q,
            density=density,
            measures_recall=measure_recall,
            longest=longest,
        )
        options.check()
        _check_json_file(json_file)
        _check_compiler()
        result = _run(options)
        line = json.dumps(result)
        _print(result)
        print(line, flush=True)
        if json_file is not None:
            json_file.write_text(line + "\n")
    if not result["fits"]:
        raise typer.Exit(DOES_NOT_FIT)


def _check_json_file(path: Path | None) -> None:
    """Before minutes of compilation."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"--json-file must be a file in a directory that exists, got {str(path)!r}")


def _check_compiler() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("mmi aot needs the TPU compiler, libtpu: install the extra tpu, pip install 'mmi-jax[tpu]'")


def _run(options: AotOptions) -> dict[str, Any]:
    """Memory of the whole program, at the longest length that fits with --longest, then the kernel there.

    Of a prompt that does not fit there is no kernel: far beyond the memory, its inputs alone do not compile.
    """
    tried = []
    with spinner(f"{options.preset} on {options.topology}") as show:
        show("compiling the prefill")
        for memory in _child(options):
            tried.append(memory)
            verdict = "fits" if memory["fits"] else "does not fit"
            show(f"{memory['padded_tokens']:,} tokens: {memory['total_bytes'] / GB:.2f} GB {verdict}")
        fitting = [memory for memory in tried if memory["fits"]]
        best = max(fitting, key=lambda memory: memory["padded_tokens"]) if fitting else tried[-1]
        result = {"options": _options_json(options), **best, "tried": tried if options.longest else []}
        if not best["fits"]:
            return result
        show("compiling the kernel")
        with tempfile.TemporaryDirectory() as dump:
            at_best = dataclasses.replace(options, tokens=best["padded_tokens"], longest=False, dump=dump)
            (kernel,) = _child(at_best, LIBTPU_INIT_ARGS=dump_flags(Path(dump)))
    return result | kernel


def _child(options: AotOptions, **environment: str) -> Iterator[dict[str, Any]]:
    """The lines of a child process as they come.

    Raises:
      ValueError: it refused the input, or died.
    """
    command = [sys.executable, "-m", "mmi_jax.cli.aot.child", json.dumps(dataclasses.asdict(options))]
    with tempfile.TemporaryFile("w+") as log:
        env = os.environ | ENVIRONMENT | environment
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True) as child:
            assert child.stdout is not None
            for text in child.stdout:
                line = json.loads(text)
                if "error" in line:
                    raise ValueError(line["error"])
                yield line
        if child.returncode:
            log.seek(0)
            lines = log.read().strip().splitlines()
            raise ValueError(f"compiling ended with status {child.returncode}: {lines[-1] if lines else 'no message'}")


def _options_json(options: AotOptions) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(options).items() if name != "dump"}


def _print(result: dict[str, Any]) -> None:
    """Memory; of a prompt that fits, kernel and bound as tables, too."""
    out, options = stdout_console(), result["options"]
    mesh = " x ".join(f"{count} {axis}" for axis, count in result["mesh"].items())
    layers = "" if options["layers"] is None else f", first {options['layers']} layers"
    out.print(
        f"{options['preset']}{layers}, {result['padded_tokens']:,} tokens on {result['chips']} chips of "
        f"{options['topology']}: {result['devices']} devices ({mesh}), compiled in {result['compile_seconds']} s",
        soft_wrap=True,
    )
    limit = result["limit_bytes"] or result["hbm_bytes_per_device"]
    verdict = "fits" if result["fits"] else "does not fit"
    held = f", {result['argument_bytes'] / GB:.2f} GB of it arguments"
    out.print(
        f"memory of each device: {result['total_bytes'] / GB:.2f} GB of {limit / GB:.2f} GB, {verdict}{held}",
        soft_wrap=True,
    )
    if "kernel" in result:
        _print_kernel(out, result)


def _print_kernel(out: Console, result: dict[str, Any]) -> None:
    """The kernel's tile and schedule, bytes moved and the roofline lower bound."""
    kernel, bound = result["kernel"], result["lower_bound_seconds"]
    vmem, vmem_limit = kernel["vmem_bytes"] / 2**20, kernel["vmem_limit_bytes"] / 2**20
    out.print(
        f"kernel tile: {kernel['block_q']} queries x {kernel['tile_kv']} keys, {vmem:.1f} of {vmem_limit:.1f} MiB VMEM"
    )
    out.print(_regions_table(kernel))
    out.print(_moved_table(result["work"]))
    out.print(
        f"roofline lower bound: {bound['all']:.4g} s; "
        f"projections {bound['matmul']:.4g} s and attention {bound['attention']:.4g} s, "
        f"memory {bound['hbm']:.4g} s, links {bound['links']:.4g} s",
        soft_wrap=True,
    )
    for assumption in result["assumptions"]:
        out.print(f"- {assumption}", soft_wrap=True)


def _regions_table(kernel: dict[str, Any]) -> Table:
    """The kernel's compute regions; the rest of it in one row."""
    table = Table("compute region at bundle", title_justify="left")
    for column in ("bundles", "MXU", "VALU", "XLU"):
        table.add_column(column, justify="right")
    for region in kernel["compute_regions"]:
        fractions = (f"{region[unit]:.1%}" for unit in ("mxu", "valu", "xlu"))
        table.add_row(str(region["first_bundle"]), f"{region['bundles']:,}", *fractions)
    table.add_row("all others", f"{kernel['bundles_elsewhere']:,}", "", "", "")
    return table


def _moved_table(work: dict[str, Any]) -> Table:
    """Bytes that the busiest device moves in the whole prefill."""
    table = Table("moved by the busiest device")
    for column in ("memory, GB", "links, GB"):
        table.add_column(column, justify="right")
    hbm, links = work["hbm_bytes"], work["link_bytes"]
    for name in dict.fromkeys([*hbm, *links]):
        table.add_row(name, *(f"{moved[name] / GB:,.1f}" if name in moved else "" for moved in (hbm, links)))
    return table
