"""SafetensorsReader: the tensors of a checkpoint directory, read one at a time."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafetensorsReader:
    """The tensors of a directory that holds one safetensors file, or shards with an index.

    Making one reads headers alone and checks that every shard is there, whole, and holds what the index says. No file
    stays mapped between reads, so that the memory in use is that of one tensor.
    """

    def __init__(self, directory: Path):
        """Reads the headers.

        Raises:
            ValueError: no checkpoint, or a missing, truncated or contradicting shard; the message names it.
        """
        self.directory = directory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._paths: dict[str, Path] = {}
        expected = self._expected_names()
        for path, names in expected.items():
            shapes = self._read_header(path)
            absent = sorted(names - shapes.keys())
            if absent:
                raise ValueError(
                    f"{path} lacks {len(absent)} tensors that {INDEX_FILE} places there, first {absent[0]!r}"
                )
            self._shapes.update(shapes)
            self._paths.update(dict.fromkeys(shapes, path))

    def names(self) -> list[str]:
        """All tensor names, shard by shard."""
        return list(self._paths)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        """A tensor, in the dtype on disk."""
        with _open(self._paths[name]) as file:
            return file.get_tensor(name)

    def _expected_names(self) -> dict[Path, set[str]]:
        """Names that each file must hold; a single file without an index need hold none."""
        single, index = self.directory / SINGLE_FILE, self.directory / INDEX_FILE
        if single.is_file():
            return {single: set()}
        if not index.is_file():
            files = sorted(path.name for path in self.directory.iterdir())
            raise ValueError(f"a checkpoint needs {SINGLE_FILE} or {INDEX_FILE}; {self.directory} holds {files}")
        try:
            weight_map = json.loads(index.read_text())["weight_map"].items()
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} must be JSON with a weight_map of names to files: {error!r}") from error
        names: dict[Path, set[str]] = {}
        for name, file in weight_map:
            names.setdefault(self.directory / file, set()).add(name)
        return names

    def _read_header(self, path: Path) -> dict[str, tuple[int, ...]]:
        if not path.is_file():
            raise ValueError(f"missing safetensors shard: {path}")
        with _open(path) as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"truncated or damaged safetensors shard: {path} ({error})") from error
