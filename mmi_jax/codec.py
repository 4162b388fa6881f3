"""Patterns as named JSON values, and back; unknown names and fields are errors that list the known ones."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmi_jax import keys, patterns
from mmi_jax.patterns.base import Pattern

_PATTERNS = {
    cls.__name__: cls
    for cls in (
        patterns.Dense,
        patterns.AShape,
        patterns.TriShape,
        patterns.VerticalSlash,
        patterns.Grid,
        patterns.BlockTopK,
        patterns.QBoundary,
        patterns.Boundary2D,
        patterns.SparseTransformerFixed,
        patterns.SparseTransformerStrided,
        patterns.SwinWindow,
    )
}
_KEYS = {cls.__name__: cls for cls in (keys.FramePlace, keys.RowPlace, keys.RankPhase)}
_MODALITIES = {"text": 0, "vision": 1, "audio": 2}


def to_json(pattern: Pattern) -> dict[str, Any]:
    """`{"pattern": "Grid", "local": 1024, ...}` with every field written out."""
    return {"pattern": type(pattern).__name__, **_fields(pattern)}


def from_json(value: Any) -> Pattern:
    """The pattern that `to_json` wrote.

    Raises:
      ValueError: no object with a known `pattern` and known fields, or a field's value is out of range.
    """
    if not isinstance(value, dict) or "pattern" not in value:
        raise ValueError(f'a pattern must be an object with the key "pattern", got {value!r}')
    return _build(value, "pattern", _PATTERNS)


def parse(text: str) -> Pattern:
    """A pattern from a command line: `Grid`, or `AShape:sink=128,local=4096` for fields that are numbers or booleans.

    Raises:
      ValueError: unknown pattern or field, or a value that is neither a number nor true or false.
    """
    name, _, assignments = text.partition(":")
    fields: dict[str, Any] = {"pattern": name}
    for assignment in filter(None, assignments.split(",")):
        field, _, value = assignment.partition("=")
        if value.lower() in ("true", "false"):
            fields[field] = value.lower() == "true"
        elif value.lstrip("-").isdigit():
            fields[field] = int(value)
        else:
            raise ValueError(f"a field must be given as name=number or name=true|false, got {assignment!r} in {text!r}")
    return from_json(fields)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _encode(value: Any) -> Any:
    match value:
        case Pattern():
            return to_json(value)
        case Mapping():
            return {_modality_names(key): _encode(inner) for key, inner in value.items()}
        case tuple():
            return [{"key": type(key).__name__, **_fields(key)} for key in value]
    return value


def _build(value: dict[str, Any], tag: str, known: dict[str, type]) -> Any:
    fields = {name: field for name, field in value.items() if name != tag}
    if value.get(tag) not in known:
        raise ValueError(f"unknown {tag} {value.get(tag)!r}: expected one of {', '.join(sorted(known))}")
    cls = known[value[tag]]
    allowed = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - set(allowed)):
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}: known fields are {', '.join(allowed)}")
    missing = [name for name, field in allowed.items() if name not in fields and field.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"{cls.__name__} needs the fields {', '.join(missing)}")
    decoded = {name: _decode(name, field) for name, field in fields.items()}
    for name, field in decoded.items():
        if isinstance(allowed[name].default, bool | int) and type(field) is not type(allowed[name].default):
            kind = type(allowed[name].default).__name__
            raise ValueError(f"{cls.__name__}.{name} must be of type {kind}, got {field!r}")
    return cls(**decoded)


def _decode(name: str, value: Any) -> Any:
    match value:
        case {"pattern": _}:
            return from_json(value)
        case dict():
            return {_modalities(key): from_json(inner) for key, inner in value.items()}
        case list():
            return tuple(_build(key, "key", _KEYS) for key in value)
    return value


def _modality_names(key: int | tuple[int, ...]) -> str:
    names = {number: name for name, number in _MODALITIES.items()}
    return ",".join(names.get(m, str(m)) for m in ((key,) if isinstance(key, int) else key))


def _modalities(text: str) -> int | tuple[int, ...]:
    numbers = []
    for name in text.split(","):
        if name not in _MODALITIES and not name.isdigit():
            raise ValueError(f"unknown modality {name!r}: expected a number or one of {', '.join(_MODALITIES)}")
        numbers.append(_MODALITIES[name] if name in _MODALITIES else int(name))
    return numbers[0] if len(numbers) == 1 else tuple(numbers)
