"""The commands of `mmi` put together; a new command is one file and one line here."""

import sys
from collections.abc import Sequence

import typer

from mmi_jax.cli.aot.command import aot
from mmi_jax.cli.bench.app import app as bench
from mmi_jax.cli.doctor.command import doctor
from mmi_jax.cli.niah.command import niah
from mmi_jax.cli.prefill.command import prefill
from mmi_jax.cli.qa.command import qa
from mmi_jax.cli.renamed_options import with_new_names
from mmi_jax.cli.search.command import search
from mmi_jax.cli.show.command import show

app = typer.Typer(
    name="mmi",
    help="Modality-aware sparse prefill for vision-language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(prefill)
app.command()(search)
app.command()(niah)
app.command()(qa)
app.command()(show)
app.command()(doctor)
app.command()(aot)
app.add_typer(bench)


_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]
"""click's ClickException: recent typer carries its own copy of click, whose names are not public."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `mmi` run with these arguments, `sys.argv` when None: 0, or 2 after `error: ...` on stderr."""
    arguments = with_new_names(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(args=arguments or ["--help"], prog_name="mmi", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
        return 130
    except _CommandLineError as error:
        print(f"error: {error.format_message()}", file=sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]
        return 2
    return status if isinstance(status, int) else 0
