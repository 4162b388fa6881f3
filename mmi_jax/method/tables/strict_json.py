"""Strict reading of JSON: files, keys of objects and types of values; a message names rule, expected and got."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

type TypeForm = Any
"""An annotation as a value, `list[str]` say: Python 3.12 has no type for it."""


def read_json(path: str | os.PathLike[str], what: str) -> object:
    """The value in a file.

    Raises:
      ValueError: no such file, or no JSON in it; the message names the file, and what it should be.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot read {what}: {error}") from error


def check_keys(value: object, what: str, needed: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """The value, an object with all needed keys and no key that is unknown; raises ValueError for any other."""
    needed = tuple(needed)
    known = (*needed, *optional)
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object with the keys {', '.join(needed)}, got {value!r}")
    if unknown := sorted(set(value) - set(known)):
        raise ValueError(f"{what} has unknown keys {', '.join(unknown)}: known keys are {', '.join(known)}")
    if missing := sorted(set(needed) - set(value)):
        raise ValueError(f"{what} lacks the keys {', '.join(missing)}: got {', '.join(value) or 'none'}")
    return value


def check_type(value: object, kind: TypeForm, name: str) -> None:
    """Raises ValueError, naming the place, unless a JSON value is of a type: str, float, or list and dict of such.

    An int is a float, but True is no number: `[[0, 0.5], [1, 1]]` is of type `list[list[float]]`.
    """
    outer, inner = get_origin(kind) or kind, get_args(kind)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number if outer is float else isinstance(value, outer)):
        raise ValueError(f"{name} must be of type {getattr(outer, '__name__', outer)}, got {value!r}")
    if isinstance(value, list) and inner:
        for n, item in enumerate(value):
            check_type(item, inner[0], f"{name}[{n}]")
    elif isinstance(value, dict) and inner:
        for key, item in value.items():
            check_type(item, inner[1], f"{name}[{key!r}]")
