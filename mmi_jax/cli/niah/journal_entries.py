"""Entries of the journal of `mmi niah`, read under their present names; journals of 0.1.0 have others."""

from collections.abc import Mapping
from typing import Any

from mmi_jax.search.trials.journal import Journal

type Cell = Mapping[str, Any]
"""A cell of the grid: JSON values by name."""

MATCHED_COST = "matched cost"
"""Kind of the entries with the cost of the matched method where it has no cell."""

_FORMER_MATCHED_COST, _FORMER_FRACTION, _FORMER_QUESTIONS = "share", "share", "asked"
"""Names in journals of 0.1.0."""


def read_cells(journal: Journal) -> list[Cell]:
    """The cells in the order they were added."""
    return [with_present_names(cell) for cell in journal.matching(kind="cell")]


def matched_fractions(journal: Journal, **values: object) -> dict[tuple[str, int], float]:
    """Cost of the matched method over that of dense attention, by task and tokens, of entries with these values."""
    former = journal.matching(kind=_FORMER_MATCHED_COST, **values)
    fractions = {(entry["task"], entry["tokens"]): entry[_FORMER_FRACTION] for entry in former}
    entries = journal.matching(kind=MATCHED_COST, **values)
    return fractions | {(entry["task"], entry["tokens"]): entry["fraction"] for entry in entries}


def with_present_names(cell: Cell) -> Cell:
    """The cell, also of a run by 0.1.0, under the present names."""
    return {("questions" if name == _FORMER_QUESTIONS else name): value for name, value in cell.items()}
