"""Options that several commands take."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from mmi_jax.cli import compile_cache
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.tables.pattern_json import parse
from mmi_jax.method.tables.pattern_table import PatternTable, load_table


class DType(enum.StrEnum):
    """Types a model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


MODEL_HELP = "Checkpoint directory, or a name on the Hugging Face hub."

ModelOption = Annotated[str, typer.Option(help=MODEL_HELP)]
OptionalModelOption = Annotated[str | None, typer.Option(help=MODEL_HELP)]
PatternTableOption = Annotated[
    Path | None, typer.Option(help="Pattern table: a JSON file with a pattern for each layer and head.")
]
PatternOption = Annotated[str | None, typer.Option(help="One pattern for all heads: NAME[:field=value,...].")]
FpsOption = Annotated[float, typer.Option(help="Frames sampled per second of video.")]
HaystackOption = Annotated[str, typer.Option(help="'generated', or a folder of videos.")]
DTypeOption = Annotated[DType, typer.Option(help="Type the model computes in.")]
CostModelOption = Annotated[
    str | None,
    typer.Option(help="Cost model: hopper, v4, v5e, v5p, v6e, tpu7x or tiles. Default: that of this device."),
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        envvar=compile_cache.ENVIRONMENT_VARIABLE, help="Directory of the compilation cache.", show_envvar=True
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def chosen_patterns(table: Path | None, pattern: str | None) -> PatternTable | Pattern | None:
    """The table or pattern that the options name; None for dense attention."""
    if table is not None and pattern is not None:
        raise ValueError(f"--table and --pattern exclude each other: got {str(table)!r} and {pattern!r}")
    if table is not None:
        return load_table(table)
    return None if pattern is None else parse(pattern)
