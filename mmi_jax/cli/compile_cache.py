"""JAX's persistent compilation cache, so that the second run of a command starts fast."""

import contextlib
import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

ENVIRONMENT_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MIN_COMPILE_SECONDS = 0.1
"""Programs that compile faster than this are not cached: reading them back would save nothing."""


def default_cache_directory() -> Path:
    """`mmi-jax/compiled` in the user's cache directory (XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mmi-jax" / "compiled"


_CACHE_ERROR = re.compile(
    r"Error (?P<what>reading|writing) persistent compilation cache entry for '(?P<program>[^']+)': (?P<why>.*)",
    re.DOTALL,
)
"""The warning of JAX 0.11.2."""


@contextlib.contextmanager
def compilation_cache_in(directory: Path | None) -> Iterator[Path]:
    """Programs compiled in the block are read from and stored in `directory`, the user's cache when None."""
    directory = directory or default_cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_SECONDS,
    }
    before = {name: jax.config.values[name] for name in settings}
    _configure(settings)
    try:
        with _replaced_entries(directory):
            yield directory
    finally:
        _configure(before)


@contextlib.contextmanager
def _replaced_entries(directory: Path) -> Iterator[None]:
    """Removes an entry that JAX finds unreadable, as a killed process or a full disk leaves it, so that it is written
    anew. JAX itself compiles the program, but never overwrites the entry, and would warn for ever.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache")
        show = warnings.showwarning

        def replace(message, category, filename, lineno, file=None, line=None) -> None:
            if not (error := _CACHE_ERROR.match(str(message))):
                return show(message, category, filename, lineno, file, line)
            if error["what"] == "reading":
                for path in directory.glob(f"{error['program']}-*"):
                    path.unlink(missing_ok=True)
                print(f"warning: the cached program {error['program']} was unreadable: compiled again", file=sys.stderr)
            else:
                print(f"warning: the program {error['program']} is not cached: {error['why']}", file=sys.stderr)

        warnings.showwarning = replace
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheContents:
    """Contents of a compilation cache.

    Args:
      num_programs: compiled programs.
      num_bytes: their size on disk; bytes.
    """

    num_programs: int
    num_bytes: int


def cache_contents(directory: Path) -> CacheContents:
    """Contents of the cache in `directory`; nothing when there is no such directory."""
    files = list(directory.glob("*-cache")) if directory.is_dir() else []
    return CacheContents(num_programs=len(files), num_bytes=sum(file.stat().st_size for file in files))


def _configure(settings: dict) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else JAX goes on with the directory it opened first
