"""Options that several benchmarks take, and the checks of their values."""

import fnmatch
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import jax
import typer

from mmi_jax.cli.options import DType
from mmi_jax.engine.settings.buckets import Buckets

CaseOption = Annotated[
    list[str] | None, typer.Option("--case", help="Case by name, or a pattern such as 'all *'; repeatable.")
]
ImplementationOption = Annotated[
    str | None,
    typer.Option(help="Backend: reference, xla, ... Default: mosaic_gpu on a GPU, else the first that can run."),
]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Measurements of each function.")]
BaselineOption = Annotated[bool, typer.Option(help="Also time dense attention, where it fits.")]
XlaBaselineOption = Annotated[bool, typer.Option("--baseline/--no-baseline", help="Also time the same by XLA.")]
PeersOption = Annotated[bool, typer.Option("--peers", help="Also time torch's attention, where torch is installed.")]
JsonFileOption = Annotated[Path | None, typer.Option(help="Also write the JSON line to this file, after every case.")]
StopOption = Annotated[bool, typer.Option("--debug", help="Stop at the first error and show its traceback.")]
DenseLimitOption = Annotated[int, typer.Option(min=1024, help="Longest prompt on which dense attention is timed.")]

PresetOption = Annotated[str, typer.Option(help="Model size: 3b, 7b, 32b, 72b of Qwen2.5-VL; weights are random.")]
LayersOption = Annotated[int | None, typer.Option(min=1, help="Run the first layers only.")]
LengthsOption = Annotated[
    list[int] | None,
    typer.Option(min=1024, max=Buckets.largest, help="Tokens of the prompt; repeatable. Default: 128K on a GPU, 2K."),
]
TableOption = Annotated[
    str, typer.Option(help="mix, grid+vertical-slash (cases of `bench plans`), dense, or a JSON pattern table.")
]
BenchDTypeOption = Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, else float32.")]


def bench_dtype(given: str | None, known: Sequence[str] = tuple(DType)) -> str:
    """The value of `BenchDTypeOption` on the default device; raises ValueError for a type that is not known."""
    check_known("--dtype", given, known)
    return given or ("bfloat16" if jax.default_backend() == "gpu" else "float32")


def check_known(option: str, value: str | None, known: Iterable[str]) -> None:
    """Raises ValueError for a value that is given and not known: once, before the cases run."""
    if value is not None and value not in (names := list(known)):
        raise ValueError(f"{option} must be one of {', '.join(names)}, got {value!r}")


def matching_cases(given: list[str] | None, known: list[str], default: list[str]) -> list[str]:
    """The known names that the given ones name or match, in the order given."""
    if unknown := [name for name in given or () if not fnmatch.filter(known, name)]:
        raise ValueError(f"unknown case {', '.join(unknown)}: known cases are {', '.join(known)}")
    return list(dict.fromkeys(n for name in given for n in fnmatch.filter(known, name))) if given else default


def parse_heads(text: str) -> tuple[int, int]:
    """Query and kv heads from "28/4"."""
    numbers = text.split("/")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(f"--heads must be query heads / kv heads, as in 28/4: got {text!r}")
    return int(numbers[0]), int(numbers[1])
