"""The choice of a backend: a named one runs or raises, None walks a written order."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def run_backend(
    backends: Mapping[Any, Callable[..., Any]], order: Sequence[Any], implementation: Any, *args: Any, **kwargs: Any
) -> Any:
    """What the chosen backend returns for these arguments.

    Args:
      backends: by name.
      order: what None tries, until one does not refuse.
      implementation: a name, or None.

    Raises:
      ValueError: the name is unknown.
      NotImplementedError: the named backend refuses.
      ExceptionGroup: no backend of the order takes the arguments; holds each one's reason.
    """
    if implementation is not None:
        if implementation not in backends:
            raise ValueError(f"{implementation=} is unknown: expected one of {tuple(backends)} or None")
        return backends[implementation](*args, **kwargs)
    refusals = []
    for name in order:
        try:
            return backends[name](*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(refusal)
    raise ExceptionGroup("no backend takes this input", refusals)
