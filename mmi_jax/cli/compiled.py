"""JAX's persistent compilation cache, so that the second run of a command starts fast."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

ENVIRONMENT_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MIN_COMPILE_SECONDS = 0.1
"""Programs that compile faster than this are not kept: reading them back would save nothing."""


def default_cache_directory() -> Path:
    """`mmi-jax/compiled` in the user's cache directory (XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mmi-jax" / "compiled"


@contextlib.contextmanager
def kept_programs(directory: Path | None) -> Iterator[Path]:
    """Programs compiled in the block are read from and kept in `directory`, the user's own when None."""
    directory = directory or default_cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_SECONDS,
    }
    before = {name: jax.config.values[name] for name in settings}
    _configure(settings)
    try:
        yield directory
    finally:
        _configure(before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheContents:
    """What a compilation cache holds.

    Args:
      num_programs: compiled programs.
      num_bytes: their size on disk; bytes.
    """

    num_programs: int
    num_bytes: int


def cache_contents(directory: Path) -> CacheContents:
    """What the cache in `directory` holds; nothing when there is no such directory."""
    files = list(directory.glob("*-cache")) if directory.is_dir() else []
    return CacheContents(num_programs=len(files), num_bytes=sum(file.stat().st_size for file in files))


def _configure(settings: dict) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else JAX goes on with the directory it opened first
