"""PatternTable: which pattern each head of each layer has, and how that was found."""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmi_jax.method.patterns import Dense, Pattern
from mmi_jax.method.tables import pattern_json

VERSION = 1
_NEEDED = ("version", "model", "provenance", "patterns", "layers")
_KNOWN = (*_NEEDED, "scores")

type PerHead = tuple[tuple[float, ...], ...]
"""A number for each layer and query head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadScores:
    """What a search found of each head's pattern.

    Args:
      error: relative squared error of the attention output against dense attention, the mean over calibration prompts.
      density: visited tiles over those of a dense head, on the dearest calibration prompt.
      cost: what the head adds to its layer's attention call, on the dearest calibration prompt, in the unit of the cost
        model that `provenance` names.
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
      provenance: how it was found: dtype, calibration data, device, date, commit; free text by name.
      scores: of each head, where a search found them.
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

    def save(self, path: str | os.PathLike) -> None:
        """Writes the table as JSON, through a temporary file: a failed run leaves no half-written one."""
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
        path = Path(path)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as directory:
            whole = Path(directory) / path.name
            whole.write_text(json.dumps(value, indent=1))
            os.replace(whole, path)


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
    if not isinstance(table, PatternTable):
        raise ValueError(f"table must be a PatternTable, a pattern or None, got {table!r}")
    table.check_fits(num_layers=num_layers, num_heads=num_heads)
    return table


def load_table(path: str | os.PathLike) -> PatternTable:
    """The table that `save` wrote.

    Raises:
      ValueError: no JSON, another version, unknown or missing keys, an unknown pattern; the message names the file.
    """
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot read a pattern table: {error}") from error
    try:
        return _table(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _table(value: Any) -> PatternTable:
    if not isinstance(value, dict) or value.get("version") != VERSION:
        got = value.get("version") if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"a pattern table must be an object with version {VERSION}, got {got!r}")
    if unknown := sorted(set(value) - set(_KNOWN)):
        raise ValueError(f"unknown keys {', '.join(unknown)}: known keys are {', '.join(_KNOWN)}")
    if missing := sorted(set(_NEEDED) - set(value)):
        raise ValueError(f"missing keys {', '.join(missing)}")
    _check_types(value)
    palette = {name: pattern_json.from_json(pattern) for name, pattern in value["patterns"].items()}
    used = {name for heads in value["layers"] for name in heads}
    if undefined := sorted(used - set(palette)):
        raise ValueError(f"layers name undefined patterns {', '.join(undefined)}: defined are {', '.join(palette)}")
    layers = tuple(tuple(palette[name] for name in heads) for heads in value["layers"])
    scores = _scores(value["scores"]) if "scores" in value else None
    return PatternTable(layers=layers, model=value["model"], provenance=value["provenance"], scores=scores)


def _scores(value: Any) -> HeadScores:
    needed = ("error", "density", "cost", "dense_cost")
    if not isinstance(value, dict) or set(value) - {"weight"} != set(needed):
        got = ", ".join(value) if isinstance(value, dict) else repr(value)
        raise ValueError(f"scores must be an object with the keys {', '.join(needed)} and maybe weight: got {got}")
    names = [name for name in value if name != "dense_cost"]
    for name in names:
        if not isinstance(value[name], list) or not all(isinstance(row, list) for row in value[name]):
            raise ValueError(f"scores.{name} must be a list of lists, by layer and head")
    rows = {name: tuple(tuple(_number(x) for x in row) for row in value[name]) for name in names}
    return HeadScores(**rows, dense_cost=_number(value["dense_cost"]))


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"scores must hold numbers, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"scores must hold numbers of a float's range, got {str(value)[:20]}...") from error


def _check_types(value: dict[str, Any]) -> None:
    """Raises ValueError for a value of another type than `save` writes, naming its key."""
    for key, kind in (("model", str), ("provenance", dict), ("patterns", dict), ("layers", list)):
        if not isinstance(value[key], kind):
            raise ValueError(f"{key} must be of type {kind.__name__}, got {value[key]!r}")
    if others := [heads for heads in value["layers"] if not isinstance(heads, list)]:
        raise ValueError(f"every layer must be a list of pattern names, got {others[0]!r}")
    if others := [name for heads in value["layers"] for name in heads if not isinstance(name, str)]:
        raise ValueError(f"a layer must name its patterns, got {others[0]!r}")
    if others := {name: text for name, text in value["provenance"].items() if not isinstance(text, str)}:
        raise ValueError(f"provenance must map names to text, got {others}")


def _name(number: int, pattern: Pattern) -> str:
    return f"{type(pattern).__name__}-{number}"
