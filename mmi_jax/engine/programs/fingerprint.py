"""A fingerprint: the same in every process for equal values, another wherever a program made of them may differ."""

import dataclasses
import functools
import hashlib
import importlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np

VERSIONED = ("builtins", "jax", "jaxlib", "flax", "numpy", "ml_dtypes", "collections", "typing")
"""Packages that are identified by their version, or by Python's; all others by their sources."""

SOURCES = ("*.py", "*.json")
"""Files of a package that a program may depend on."""


class NoFingerprintError(TypeError):
    """A value has no text that is sure to differ from those of others."""


def digest(value: Any, *packages: str) -> str:
    """64 hexadecimal digits of the value, and of the sources of these packages and of those its types come from.

    Raises:
      NoFingerprintError: something in the value is not identified by its contents.
    """
    named = set(packages)
    text = "\n".join(_texts(value, named))
    text += "".join(f"\n{name} {_package(name)}" for name in sorted({name.partition(".")[0] for name in named}))
    return hashlib.sha256(text.encode()).hexdigest()


def _texts(x: Any, packages: set[str]) -> Iterator[str]:
    """Pieces of text of the value; the modules that its types and functions come from are added to `packages`."""
    of = lambda y: _texts(y, packages)  # noqa: E731
    match x:
        case None | bool() | int() | float() | complex() | str() | bytes() | np.dtype() | np.generic():
            yield f"{type(x).__name__} {x!r}"
        case type():
            packages.add(x.__module__)
            yield f"type {x.__module__}.{x.__qualname__}"
        case types.FunctionType():
            packages.add(x.__module__)
            yield f"function {x.__module__}.{x.__qualname__}"
            cells = [cell.cell_contents for cell in x.__closure__ or ()]
            yield from of((x.__defaults__, x.__kwdefaults__, cells))
        case types.BuiltinFunctionType():
            yield f"builtin {x.__module__}.{x.__qualname__}"
        case functools.partial():
            yield from of(("partial", x.func, x.args, x.keywords))
        case jax.tree_util.PyTreeDef():
            yield f"tree {_without_addresses(str(x))}"
        case Mapping():
            yield f"mapping {len(x)}"
            for key, value in x.items():
                yield from of(key)
                yield from of(value)
        case Set():
            yield from sorted("; ".join(of(y)) for y in x)
        case Sequence():
            yield f"{type(x).__name__} {len(x)}"
            for y in x:
                yield from of(y)
        case _ if dataclasses.is_dataclass(x):
            yield from of(type(x))
            for field in dataclasses.fields(x):
                yield f"field {field.name}"
                yield from of(getattr(x, field.name))
        case _ if hasattr(x, "__wrapped__"):  # a function under jit
            yield from of(x.__wrapped__)
        case _:
            raise NoFingerprintError(f"expected values that are identified by their contents, got {type(x)}")


def _without_addresses(text: str) -> str:
    if " at 0x" in text:
        raise NoFingerprintError(f"expected a text without addresses, got {text[:200]}")
    return text


@functools.cache
def _package(name: str) -> str:
    """The version of a package, or the digest of its sources."""
    module = sys.modules.get(name) or importlib.import_module(name)
    if name in VERSIONED or name in sys.stdlib_module_names:
        return str(getattr(module, "__version__", sys.version))
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        raise NoFingerprintError(f"expected a module with a source file, got {name}")
    path = Path(file)
    files = [path] if path.name != "__init__.py" else sorted(f for kind in SOURCES for f in path.parent.rglob(kind))
    sources = hashlib.sha256()
    for source in files:
        sources.update(f"{source.relative_to(path.parent)}".encode())
        sources.update(source.read_bytes())
    return sources.hexdigest()
