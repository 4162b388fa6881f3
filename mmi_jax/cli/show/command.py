"""`mmi show`: a pattern table as grids of layers and heads."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mmi_jax import PatternTable
from mmi_jax.cli import console
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.options import DebugOption
from mmi_jax.cli.show.table_view import print_table
from mmi_jax.method.tables.pattern_table import load_table
from mmi_jax.search.baselines.minference import is_minference, load_minference


def show(
    table: Annotated[Path, typer.Argument(help="Pattern table, JSON, or one published by MInference.")],
    plots: Annotated[Path | None, typer.Option(help="Directory for pictures of the same.")] = None,
    debug: DebugOption = False,
) -> None:
    """Print a pattern table. The pattern of each head, provenance, and error and cost where a search wrote them."""
    with one_line_errors(shows_traceback=debug):
        loaded = _load(table)
        print_table(loaded, console.stdout_console())
        if plots is not None:
            _draw(loaded, plots)


def _load(path: Path) -> PatternTable:
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        value = None  # load_table says what is wrong
    return load_minference(path) if is_minference(value) else load_table(path)


def _draw(table: PatternTable, directory: Path) -> None:
    from mmi_jax.cli.pictures import write_figure
    from mmi_jax.plots import table_plots  # here, so that the other commands start without matplotlib

    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--plots must name a directory, got the file {str(directory)!r}")
    directory.mkdir(parents=True, exist_ok=True)
    figures = {"patterns": table_plots.plot_patterns(table)}
    if table.scores is not None:
        figures["scores"] = table_plots.plot_scores(table.scores)
    for name, figure in figures.items():
        print(f"wrote {write_figure(directory / f'{name}.png', figure)}")
