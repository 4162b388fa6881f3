"""Pattern tables: a pattern for each head of each layer, its provenance and scores; saved and loaded as JSON."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from mmi_jax.files import write_whole
from mmi_jax.method.patterns import Dense, Pattern
from mmi_jax.method.tables import pattern_json
from mmi_jax.method.tables.strict_json import check_keys, check_type, read_json

VERSION = 1
_TYPES = {"model": str, "provenance": dict[str, str], "patterns": dict, "layers": list[list[str]]}
"""Keys of a table that every file has in addition to the version, and their types."""

type PerHead = tuple[tuple[float, ...], ...]
"""A number for each layer and query head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadScores:
    """Scores of each head's pattern, by a search.

    Args:
      error: relative squared error of the attention output against dense attention, the mean over calibration prompts.
      density: visited tiles over those of a dense head, on the most expensive calibration prompt.
      cost: what the head adds to its layer's attention call, on the most expensive calibration prompt, in the unit of
        the cost model that `provenance` names.
      dense_cost: of a dense head, on that prompt.
      weight: how much an error of the head counted, 1 on average; None where all counted the same.
    """

    error: PerHead
    density: PerHead
    cost: PerHead
    dense_cost: float
    weight: PerHead | None = None

    def __post_init__(self):
        """Raises ValueError unless all are numbers, not negative, and of one shape."""
        shapes = set()
        for name in ("error", "density", "cost", *([] if self.weight is None else ["weight"])):
            values = getattr(self, name)
            shapes.add(tuple(len(row) for row in values))
            if not all(0 <= x < math.inf for row in values for x in row):
                raise ValueError(f"scores.{name} must hold finite numbers, none negative, by layer and head")
        if len(shapes) != 1:
            raise ValueError(
                f"error, density, cost and weight must have one number for each head, got heads {sorted(shapes)}"
            )
        if not self.dense_cost > 0:
            raise ValueError(f"scores.dense_cost must be a positive number, got {self.dense_cost!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternTable:
    """A pattern for each layer and query head.

    Args:
      layers: `layers[n][h]` is the pattern of query head `h` in layer `n`; every layer has as many heads.
      model: name of the model the table was made for.
      provenance: of its making: dtype, calibration data, device, date, commit; free text by name.
      scores: of each head, if it is from a search.
    """

    layers: tuple[tuple[Pattern, ...], ...]
    model: str = ""
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scores: HeadScores | None = None

    def __post_init__(self):
        """Raises ValueError for a table without layers, layers of different widths, or scores of other heads."""
        widths = {len(heads) for heads in self.layers}
        if len(widths) != 1 or 0 in widths:
            raise ValueError(f"every layer of a table must have the same number of heads, at least 1: got {widths}")
        if self.scores is not None and [len(row) for row in self.scores.error] != [len(row) for row in self.layers]:
            raise ValueError(
                f"scores must be of the table's heads: expected {self.num_layers} layers of {self.num_heads} heads, "
                f"got heads {[len(row) for row in self.scores.error]}"
            )

    @property
    def num_layers(self) -> int:
        """Layers of the table."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads of each layer."""
        return len(self.layers[0])

    def check_fits(self, *, num_layers: int, num_heads: int) -> None:
        """Raises ValueError if the table is for a model of another shape."""
        if (self.num_layers, self.num_heads) != (num_layers, num_heads):
            raise ValueError(
                f"the table must be made for this model: expected {num_layers} layers of {num_heads} heads, "
                f"got {self.num_layers} layers of {self.num_heads} heads (table for {self.model or 'an unnamed model'})"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON, whole or not at all."""
        names = {pattern: _name(n, pattern) for n, pattern in enumerate(dict.fromkeys(sum(self.layers, ())))}
        value = {
            "version": VERSION,
            "model": self.model,
            "provenance": dict(self.provenance),
            "patterns": {name: pattern_json.to_json(pattern) for pattern, name in names.items()},
            "layers": [[names[pattern] for pattern in heads] for heads in self.layers],
        }
        if self.scores is not None:
            value["scores"] = {k: v for k, v in dataclasses.asdict(self.scores).items() if v is not None}
        write_whole(Path(path), json.dumps(value, indent=1))


def uniform_table(pattern: Pattern, *, num_layers: int, num_heads: int) -> PatternTable:
    """The table in which every head has one pattern."""
    return PatternTable(layers=((pattern,) * num_heads,) * num_layers, provenance={"source": "one pattern for all"})


def as_table(table: PatternTable | Pattern | None, *, num_layers: int, num_heads: int) -> PatternTable:
    """A table for a model of these sizes: one pattern, or None for dense attention, is that of every head.

    Raises:
      ValueError: the table is for a model of another shape, or no table.
    """
    if table is None or isinstance(table, Pattern):
        return uniform_table(table or Dense(), num_layers=num_layers, num_heads=num_heads)
    if not isinstance(table, PatternTable):  # pyright: ignore[reportUnnecessaryIsInstance] # users' code may be unchecked
        raise ValueError(f"table must be a PatternTable, a pattern or None, got {table!r}")
    table.check_fits(num_layers=num_layers, num_heads=num_heads)
    return table


def load_table(path: str | os.PathLike[str]) -> PatternTable:
    """The table that `save` wrote.

    Raises:
      ValueError: no JSON, another version, unknown or missing keys, an unknown pattern; the message names the file.
    """
    value = read_json(path, "a pattern table")
    try:
        return _table(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _table(value: object) -> PatternTable:
    if not isinstance(value, dict) or value.get("version") != VERSION:
        got = value.get("version") if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"a pattern table must be an object with version {VERSION}, got {got!r}")
    fields = check_keys(value, "a pattern table", ("version", *_TYPES), ("scores",))
    for name, kind in _TYPES.items():
        check_type(fields[name], kind, name)
    palette = {name: pattern_json.from_json(pattern) for name, pattern in fields["patterns"].items()}
    used = {name for heads in fields["layers"] for name in heads}
    if undefined := sorted(used - set(palette)):
        raise ValueError(f"layers name undefined patterns {', '.join(undefined)}: defined are {', '.join(palette)}")
    layers = tuple(tuple(palette[name] for name in heads) for heads in fields["layers"])
    scores = _scores(fields["scores"]) if "scores" in fields else None
    return PatternTable(layers=layers, model=fields["model"], provenance=fields["provenance"], scores=scores)


def _scores(value: object) -> HeadScores:
    fields = check_keys(value, "scores", ("error", "density", "cost", "dense_cost"), ("weight",))
    check_type(fields["dense_cost"], float, "scores.dense_cost")
    per_head = {name: numbers for name, numbers in fields.items() if name != "dense_cost"}
    for name, numbers in per_head.items():
        check_type(numbers, list[list[float]], f"scores.{name}")
    grids = {name: tuple(tuple(map(_float, heads)) for heads in numbers) for name, numbers in per_head.items()}
    return HeadScores(**grids, dense_cost=_float(fields["dense_cost"]))


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"scores must hold numbers of a float's range, got {str(value)[:20]}...") from error


def _name(number: int, pattern: Pattern) -> str:
    return f"{type(pattern).__name__}-{number}"
