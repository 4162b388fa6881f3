"""Reading what a published directory holds: JSON, CSV, Parquet and videos, with errors that name the file."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.tasks.haystack import VIDEO_SUFFIXES


def existing(directory: str | Path, *names: str) -> Path:
    """The first of some files, wherever below the directory it lies.

    Raises:
        ValueError: no such directory, or none of the files in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"a data set is a directory as published, got {str(directory)!r}")
    for name in names:
        if paths := sorted(directory.rglob(name)):
            return paths[0]
    raise ValueError(f"{directory} must hold {' or '.join(names)}, got neither")


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        ValueError: pyarrow is not installed, or the file cannot be read.
    """
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install 'mmi-jax[parquet]'") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from error


def field(row: Mapping[str, Any], name: str, path: Path) -> Any:
    """A field of a record; raises ValueError, naming file and known fields, where it is missing."""
    if not isinstance(row, Mapping) or name not in row:
        known = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{path}: a record must have the field {name!r}, got {known}")
    return row[name]


class Videos:
    """The videos below a directory, by the name of the file without its suffix."""

    def __init__(self, directory: str | Path):
        """Looks through the directory once."""
        self.directory = Path(directory)
        files = sorted(path for path in self.directory.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
        self._by_stem = {path.stem: path for path in reversed(files)}

    def __getitem__(self, names: str | Iterable[str]) -> Path:
        """The file of a video that may be called by several names.

        Raises:
            ValueError: it is not there.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            if name in self._by_stem:
                return self._by_stem[name]
        raise ValueError(f"no video {' or '.join(names)} ({', '.join(VIDEO_SUFFIXES)}) below {self.directory}")
