"""Patterns as named JSON values, and back; unknown names and fields are errors that list the known ones."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from mmi_jax.method.patterns import PATTERNS, Pattern
from mmi_jax.method.tables.strict_json import TypeForm, check_keys
from mmi_jax.method.token_groups import FramePlace, Grouping, RankPhase, RowPlace

_PATTERNS = {cls.__name__: cls for cls in PATTERNS}
_KEYS: dict[str, type[FramePlace | RowPlace | RankPhase]] = {
    cls.__name__: cls for cls in (FramePlace, RowPlace, RankPhase)
}
_MODALITIES = {"text": 0, "vision": 1, "audio": 2}


def pattern_names() -> frozenset[str]:
    """The names of all patterns."""
    return frozenset(_PATTERNS)


def to_json(pattern: Pattern) -> dict[str, Any]:
    """`{"pattern": "Grid", "local": 1024, ...}` with every field written out.

    Raises:
      ValueError: `from_json` would not know the pattern, because it is not one of this package.
    """
    if _PATTERNS.get(type(pattern).__name__) is not type(pattern):
        raise ValueError(f"only {', '.join(sorted(_PATTERNS))} can be written as JSON, got {pattern!r}")
    return {"pattern": type(pattern).__name__, **_fields(pattern)}


def from_json(value: object) -> Pattern:
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
        if field in fields:
            raise ValueError(f"a field must be given once, got {field!r} again in {text!r}")
        if value.lower() in ("true", "false"):
            fields[field] = value.lower() == "true"
        elif re.fullmatch(r"-?[0-9]+", value):
            fields[field] = int(value)
        else:
            raise ValueError(f"a field must be given as name=number or name=true|false, got {assignment!r} in {text!r}")
    return from_json(fields)


def _fields(value: Pattern | Grouping) -> dict[str, object]:
    return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _encode(value: object) -> object:
    match value:
        case Pattern():
            return to_json(value)
        case Mapping():
            return {_modality_names(key): _encode(inner) for key, inner in value.items()}
        case tuple():
            return [{"key": type(key).__name__, **_fields(key)} for key in value]
        case _:
            return value


def _build[T](value: dict[str, Any], tag: str, known: Mapping[str, type[T]]) -> T:
    if not isinstance(value.get(tag), str) or value[tag] not in known:
        raise ValueError(f"unknown {tag} {value.get(tag)!r}: expected one of {', '.join(sorted(known))}")
    cls = known[value[tag]]
    allowed = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    needed = [name for name, field in allowed.items() if field.default is dataclasses.MISSING]
    fields = {name: field for name, field in value.items() if name != tag}
    check_keys(fields, cls.__name__, needed, [name for name in allowed if name not in needed])
    decoded = {name: _decode(field, allowed[name].type) for name, field in fields.items()}
    for name, field in decoded.items():
        kind: TypeForm = allowed[name].type
        if not _is_of(field, kind):
            kind = kind.__name__ if isinstance(kind, type) and not get_args(kind) else kind
            raise ValueError(f"{cls.__name__}.{name} must be of type {kind}, got {fields[name]!r}")
    return cls(**decoded)


def _is_of(value: object, kind: TypeForm) -> bool:
    """Whether a decoded value is of a field's annotated type."""
    args = get_args(kind)
    if get_origin(kind) is Mapping:
        return isinstance(value, Mapping) and all(_is_of(key, args[0]) for key in value)
    if get_origin(kind) is tuple and args[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(args)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple)
    return type(value) is kind if kind in (int, bool) else isinstance(value, kind)


def _decode(value: object, kind: TypeForm) -> object:
    """The value of a field annotated as `kind`; as it is where it has the wrong form."""
    match value:
        case dict() if kind is Pattern:
            return from_json(value)
        case dict() if get_origin(kind) is Mapping:
            return {_modalities(key): from_json(inner) for key, inner in value.items()}
        case list() if get_origin(kind) is tuple:
            return tuple(_key(key) for key in value)
        case _:
            return value


def _key(value: object) -> Grouping:
    if not isinstance(value, dict):
        raise ValueError(f'a stride must be an object with the key "key", got {value!r}')
    return _build(value, "key", _KEYS)


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
