"""Files and directories that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory next to `path`, which becomes `path` when the block succeeds and vanishes when it fails.

    Raises:
        ValueError: something other than an empty directory is at `path`.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"a checkpoint is saved to a new or empty directory, {path} holds something")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path`, readable by all, when the block succeeds.

    On an error the old file stays, and nothing is left next to it.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
        temporary = Path(directory) / path.name
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes the file in one step, as `new_file`."""
    with new_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_target(path: Path) -> None:
    """Raises ValueError unless a file can be written at `path`: before the work whose result goes there."""
    if path.is_dir():
        raise ValueError(f"{path} must be a file, got a directory")
    if not path.parent.is_dir():
        raise ValueError(f"{path} must be in a directory that exists, got {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} must be in a directory that can be written, got {path.parent}")
