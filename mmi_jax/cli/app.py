"""The commands of `mmi` put together; a new command is one file and one line here."""

import sys
from collections.abc import Sequence

import typer

from mmi_jax.cli import bench, bench_batch, bench_first_token, bench_model, bench_prefill, bench_soak
from mmi_jax.cli.aot import aot
from mmi_jax.cli.doctor import doctor
from mmi_jax.cli.niah import niah
from mmi_jax.cli.prefill import prefill
from mmi_jax.cli.qa import qa
from mmi_jax.cli.search import search
from mmi_jax.cli.show import show

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
bench.app.command()(bench_model.decode)
bench.app.command()(bench_model.vision)
bench.app.command()(bench_prefill.prefill)
bench.app.command()(bench_batch.batch)
bench.app.command()(bench_first_token.first_token)
bench.app.command("soak")(bench_soak.run_soak)
app.add_typer(bench.app)


_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]
"""click's ClickException: recent typer carries its own copy of click, whose names are not public."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `mmi` run with these arguments, `sys.argv` when None: 0, or 2 after `error: ...` on stderr."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = app(args=arguments or ["--help"], prog_name="mmi", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
        return 130
    except _CommandLineError as error:
        print(f"error: {error.format_message()}", file=sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]
        return 2
    return status if isinstance(status, int) else 0
