"""Options that several commands take."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from mmi_jax.cli import compiled


class DType(enum.StrEnum):
    """Types a model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


CacheDirOption = Annotated[
    Path | None, typer.Option(envvar=compiled.ENVIRONMENT_VARIABLE, help="Compiled programs.", show_envvar=True)
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
CostsOption = Annotated[
    str | None, typer.Option(help="hopper, v4, v5e, v5p, v6e, tpu7x or tiles: this device's unless given.")
]
