"""ProgramCache: the compiled programs of this process, each made once; `PROGRAMS` is the one instance.

It owns what would otherwise be a global dictionary in every module that compiles: prefill's programs and those that a
search measures with. Programs on disk are another matter, see `executable_cache`.
"""

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax
from jaxtyping import PyTree


@dataclasses.dataclass(frozen=True)
class ProgramKey:
    """A program: its kind, and everything else that it depends on.

    Args:
      kind: "start", "layer" and "end" of a prefill's chunk, or another word of another owner.
      identity: everything that it depends on except the arguments.
      arguments: their tree, shapes and dtypes.
    """

    kind: str
    identity: Hashable
    arguments: Hashable

    @classmethod
    def of(cls, kind: str, identity: Hashable, arguments: PyTree) -> "ProgramKey":
        """The key of a program for arguments of these shapes, arrays or shapes in their place."""
        leaves, tree = jax.tree.flatten(arguments)
        return cls(kind, identity, (tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)))


class ProgramCache:
    """Compiled programs by key. Threads compile, but only the one that needs a program adds it."""

    def __init__(self) -> None:
        """Empty."""
        self._programs: dict[Hashable, jax.stages.Compiled] = {}

    def __contains__(self, key: Hashable) -> bool:
        """Whether the program was compiled."""
        return key in self._programs

    def __getitem__(self, key: Hashable) -> jax.stages.Compiled:
        """A program that was compiled."""
        return self._programs[key]

    def add(self, programs: Mapping[Any, jax.stages.Compiled]) -> None:
        """Keeps these programs."""
        self._programs.update(programs)

    def of_kinds(self, *kinds: str) -> Iterator[jax.stages.Compiled]:
        """The programs of some kinds, in the order in which they were added."""
        return (program for key, program in self._programs.items() if isinstance(key, ProgramKey) and key.kind in kinds)

    def clear(self) -> None:
        """Forgets all programs; what still holds one can still run it."""
        self._programs.clear()


PROGRAMS = ProgramCache()
"""Of this process."""
