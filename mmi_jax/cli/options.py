"""Options that several commands take."""

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import typer

from mmi_jax.cli import compile_cache
from mmi_jax.engine.settings.buckets import Buckets


class DType(enum.StrEnum):
    """Types a model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


CacheDirOption = Annotated[
    Path | None, typer.Option(envvar=compile_cache.ENVIRONMENT_VARIABLE, help="Compiled programs.", show_envvar=True)
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
CostsOption = Annotated[
    str | None, typer.Option(help="hopper, v4, v5e, v5p, v6e, tpu7x or tiles: this device's unless given.")
]

PresetOption = Annotated[str, typer.Option(help="Size of Qwen2.5-VL: 3b, 7b, 32b, 72b; weights are random.")]
LayersOption = Annotated[int | None, typer.Option(min=1, help="Run the first layers only.")]
LengthsOption = Annotated[
    list[int] | None,
    typer.Option(min=1024, max=Buckets.largest, help="Tokens of the prompt; may be repeated. 128K on a GPU, else 2K."),
]
TableOption = Annotated[
    str, typer.Option(help="mix, grid+vertical-slash (cases of `bench plans`), dense, or a JSON pattern table.")
]
BenchDTypeOption = Annotated[str | None, typer.Option(help="bfloat16 on a GPU, else float32.")]


def bench_dtype(asked: str | None, known: Sequence[str] = tuple(DType)) -> str:
    """What `BenchDTypeOption` stands for on the default device; raises ValueError for a type that is not known."""
    if asked is not None and asked not in known:
        raise ValueError(f"--dtype must be one of {', '.join(known)}, got {asked!r}")
    return asked or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
