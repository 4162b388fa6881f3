"""Errors of bad input, printed as one line on stderr."""

import contextlib
import sys
from collections.abc import Iterator

import jax
import typer

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@contextlib.contextmanager
def one_line_errors(*, shows_traceback: bool) -> Iterator[None]:
    """Ends the program with status 2 and `error: ...` when the block raises what bad input raises.

    Args:
      shows_traceback: lets the error through as it is.

    Raises:
      typer.Exit: in place of ValueError, OSError, NotImplementedError, a group of refusals, or exhausted memory.
    """
    try:
        yield
    except (ValueError, OSError, NotImplementedError, ExceptionGroup, jax.errors.JaxRuntimeError) as error:
        is_ours = not isinstance(error, jax.errors.JaxRuntimeError) or OUT_OF_MEMORY in str(error)
        if shows_traceback or not is_ours:
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        raise typer.Exit(2) from None


def _message(error: BaseException) -> str:
    """The error's message on one line; the reasons of a group one after another."""
    if isinstance(error, ExceptionGroup):
        return f"{error.message}: {'; '.join(map(_message, error.exceptions))}"
    return " ".join(str(error).split())
