"""Small files of a checkpoint directory, with errors that name them."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is missing, no JSON, or not an object.
    """
    try:
        content = json.loads(existing(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def existing(path: Path) -> Path:
    """The file; raises ValueError where a checkpoint lacks it."""
    if not path.is_file():
        raise ValueError(f"a checkpoint must have the file {path.name}, got none in {path.parent}")
    return path
