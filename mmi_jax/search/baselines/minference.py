"""The per-head tables that MInference 1.0 published, read as a `PatternTable`.

The form (microsoft/MInference, `minference/configs/*.json`; arXiv 2407.02490): a list over layers of objects that map a
query head's number to `[pattern, a, b, score]`. The names meant to its kernels:

- `vertical_and_slash`: `a` columns and `b` diagonals, at least 30 and 50; the first 30 columns and the nearest 100
  diagonals are forced.
- `block_sparse`: 100 blocks of 64 keys for each 64 queries, whatever `a` and `b` say; here 50 blocks of 128.
- `stream_llm`: `a` sinks and a window of `b`.

The fourth number is the score of MInference's search, the fraction of attention kept, in its units; it is not ours.
"""

import os
from pathlib import Path
from typing import Any, TypeGuard

from mmi_jax.method.patterns import AShape, BlockTopK, Pattern, VerticalSlash
from mmi_jax.method.tables.pattern_table import PatternTable
from mmi_jax.method.tables.strict_json import read_json

MIN_VERTICAL, MIN_SLASH, FORCED_SLASH = 30, 50, 100
"""At least, whatever a head names; microsoft/MInference, `minference/modules/minference_forward.py`."""

BLOCK_SPARSE_KEYS, BLOCK_KV = 100 * 64, 128
"""Keys of its `block_sparse` heads, 100 blocks of 64; keys of a block here."""


def load_minference(path: str | os.PathLike[str]) -> PatternTable:
    """The table in a file of MInference's form.

    Raises:
      ValueError: no JSON, another form, or an unknown pattern; the message names the file, layer and head.
    """
    path = Path(path)
    value = read_json(path, "a table of MInference")
    if not is_minference(value):
        raise ValueError(f'{path}: a table of MInference is a list over layers of {{"head": [pattern, a, b, score]}}')
    layers = tuple(_layer(heads, f"{path}: layer {n}") for n, heads in enumerate(value))
    return PatternTable(layers=layers, provenance={"source": f"MInference's {path.name}", "searched on": "text"})


def is_minference(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a JSON value has the outer form of such a table."""
    return isinstance(value, list) and bool(value) and all(isinstance(heads, dict) and heads for heads in value)


def _layer(heads: dict[str, Any], where: str) -> tuple[Pattern, ...]:
    expected = [str(n) for n in range(len(heads))]
    if sorted(heads) != sorted(expected):
        raise ValueError(f"{where}: heads must be numbered 0 to {len(heads) - 1}, got {', '.join(heads)}")
    return tuple(_pattern(heads[name], f"{where}, head {name}") for name in expected)


def _pattern(value: object, where: str) -> Pattern:
    match value:
        case ["vertical_and_slash", int(vertical), int(slash), *_]:
            return VerticalSlash(vertical=max(vertical, MIN_VERTICAL), slash=max(slash, MIN_SLASH), local=FORCED_SLASH)
        case ["block_sparse", *_]:
            return BlockTopK(num_blocks=BLOCK_SPARSE_KEYS // BLOCK_KV)
        case ["stream_llm", int(sink), int(local), *_]:
            return AShape(sink=sink, local=local)
    raise ValueError(
        f"{where}: a head must be [vertical_and_slash, block_sparse or stream_llm, number, number, score], "
        f"got {value!r}"
    )
