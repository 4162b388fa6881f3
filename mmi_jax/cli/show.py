"""`mmi show`: a pattern table as a grid of layers and heads."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from mmi_jax import PatternTable, console
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.patterns import Pattern
from mmi_jax.table import load_table

COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta", "bright_green")


def show(
    table: Annotated[Path, typer.Argument(help="A pattern table, JSON.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Print which pattern each head of each layer has, the patterns' fields, and how the table was found."""
    with one_line_errors(shows_traceback=debug):
        loaded = load_table(table)
    out = console.stdout_console()
    marks = _marks(loaded)
    out.print(heads_grid(loaded, marks), soft_wrap=True)
    out.print(patterns_table(loaded, marks), soft_wrap=True)
    out.print(f"model: {loaded.model or 'unnamed'}", markup=False)
    for name, value in loaded.provenance.items():
        out.print(f"{name}: {value}", markup=False)


def heads_grid(table: PatternTable, marks: dict[Pattern, Text]) -> Text:
    """One line per layer, one mark per head."""
    width = len(str(table.num_layers - 1))
    lines = [Text(f"layer {n:>{width}}  ") + Text(" ").join(marks[p] for p in heads) for n, heads in _numbered(table)]
    return Text("\n").join(lines)


def patterns_table(table: PatternTable, marks: dict[Pattern, Text]) -> Table:
    """Mark, number of heads, and the pattern with all its fields."""
    heads = sum(table.layers, ())
    found = Table("mark", "heads", "pattern")
    for pattern, mark in marks.items():
        found.add_row(mark, str(heads.count(pattern)), Text(str(pattern), overflow="fold"))
    return found


def _numbered(table: PatternTable) -> list[tuple[int, tuple[Pattern, ...]]]:
    return list(enumerate(table.layers))


def _marks(table: PatternTable) -> dict[Pattern, Text]:
    """A coloured letter and number for each distinct pattern: `G1` is the first Grid."""
    marks: dict[Pattern, Text] = {}
    for n, pattern in enumerate(dict.fromkeys(sum(table.layers, ()))):
        name = type(pattern).__name__
        number = 1 + sum(type(other) is type(pattern) for other in marks)
        marks[pattern] = Text(f"{_short(name)}{number}", style=COLORS[n % len(COLORS)])
    return marks


def _short(name: str) -> str:
    """The capitals of a pattern's name: VerticalSlash is VS."""
    return "".join(letter for letter in name if letter.isupper())
