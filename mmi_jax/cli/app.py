"""The commands of `mmi` put together; a new command is one file and one line here."""

import sys
from collections.abc import Sequence

import click
import typer

from mmi_jax.cli import bench
from mmi_jax.cli.doctor import doctor
from mmi_jax.cli.prefill import prefill
from mmi_jax.cli.show import show

app = typer.Typer(
    name="mmi",
    help="Modality-aware sparse prefill for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(prefill)
app.command()(show)
app.command()(doctor)
app.add_typer(bench.app)


@app.callback()
def _commands() -> None:
    """Modality-aware sparse prefill for vision-language models."""  # without it one command would need no name


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `mmi` run with these arguments, `sys.argv` when None: 0, or 2 after `error: ...` on stderr."""
    try:
        status = app(args=arguments, prog_name="mmi", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.ClickException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        return 2
    except (click.Abort, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
        return 130
    return status if isinstance(status, int) else 0
