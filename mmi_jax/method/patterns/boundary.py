"""Boundary patterns: queries, or queries and keys, grouped by modality (paper sections 2.3 and 3.2, Alg. 2 and 3).

No-Boundary and K-Boundary heads need nothing special: an intra-modality pattern serves the whole prompt.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mmi_jax.layout import TEXT, VISION
from mmi_jax.method.kv_views import AllKeys, KeySet, OfModality, View
from mmi_jax.method.patterns.base import Pattern
from mmi_jax.method.patterns.block_top_k import BlockTopK
from mmi_jax.method.patterns.dense import Dense
from mmi_jax.method.patterns.grid import Grid
from mmi_jax.method.patterns.streaming import AShape
from mmi_jax.method.patterns.vertical_slash import VerticalSlash
from mmi_jax.method.query_parts import Everything, Part, QBlocks, Runs, Scope
from pallas_kernels.block_lists.block_sizes import Blocks


class _Boundary(Pattern):
    """What both boundary patterns are: a mapping from modalities to patterns, and a pattern for the rest."""

    inner: Mapping[Any, Pattern]
    other: Pattern

    def __post_init__(self) -> None:
        """Stores `inner` in hashable form; raises ValueError for an empty mapping or a nested boundary."""
        object.__setattr__(self, "inner", _Frozen(self.inner))
        name = type(self).__name__
        if not self.inner:
            raise ValueError(f"{name}.inner must map at least one modality to a pattern, got an empty mapping")
        patterns: list[tuple[object, object]] = [*self.inner.items(), ("other", self.other)]
        for key, inner in patterns:
            if isinstance(inner, _Boundary) or not isinstance(inner, Pattern):
                raise ValueError(f"{name}.inner[{key!r}] must be an intra-modality pattern, got {inner!r}")

    @property
    def reads_scores(self) -> bool:
        """Whether an inner pattern does."""
        return any(pattern.reads_scores for pattern in (*self.inner.values(), self.other))

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """What vision queries visit, who are most of a long prompt; what any query may if none are listed."""
        items = [(key if isinstance(key, int) else key[0], inner) for key, inner in self.inner.items()]
        listed = [inner for modality, inner in items if modality == VISION] or [inner for _, inner in items]
        visited = [inner.typical_blocks(num_kv_blocks, blocks) for inner in listed]
        return None if None in visited else max(x for x in visited if x is not None)


@dataclasses.dataclass(frozen=True)
class QBoundary(_Boundary):
    """Queries grouped by modality, each group with its pattern over all keys.

    Text sees everything, vision a window of one, over t v v t:

        1 0 0 0
        0 1 0 0
        0 0 1 0
        1 1 1 1

    Each group's index is estimated from the last queries of that group.

    Args:
      inner: pattern for the queries of each modality (0 text, 1 vision, ...).
      other: pattern for the queries of all modalities not listed.
    """

    inner: Mapping[int, Pattern]
    other: Pattern = Dense()

    @classmethod
    def example(cls) -> "QBoundary":
        """An instance for a prompt of about a hundred tokens."""
        return cls({VISION: Grid.example(), TEXT: VerticalSlash.example()})

    def views(self, key_set: KeySet, blocks: Blocks) -> tuple[View, ...]:
        """The views of every inner pattern."""
        return tuple(view for pattern in (*self.inner.values(), self.other) for view in pattern.views(key_set, blocks))

    def parts(self, scope: Scope) -> list[Part]:
        """The inner patterns' parts."""
        listed = tuple(self.inner)
        patterns = [(OfModality(m, listed), pattern) for m, pattern in self.inner.items()]
        patterns.append((OfModality(None, listed), self.other))
        queries = scope.geometry.queries
        return sum(_numbered_apart([p.parts(scope.restrict(m.holds(queries))) for m, p in patterns]), [])


@dataclasses.dataclass(frozen=True)
class Boundary2D(_Boundary):
    """Queries and keys grouped by modality; each pair of modalities has its pattern, one softmax over all.

    Vision to vision a window of one, everything else dense, over t v v t:

        1 0 0 0
        1 1 0 0
        1 0 1 0
        1 1 1 1

    Args:
      inner: pattern for each (query modality, key modality).
      other: pattern for all pairs not listed.
    """

    inner: Mapping[tuple[int, int], Pattern]
    other: Pattern = Dense()

    @classmethod
    def example(cls) -> "Boundary2D":
        """An instance for a prompt of about a hundred tokens."""
        lines, window = VerticalSlash.example(), AShape.example()
        return cls({(VISION, VISION): lines, (TEXT, VISION): window, (VISION, TEXT): BlockTopK(2)})

    @property
    def _modalities(self) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
        """The listed modalities, None last for all others; and the listed ones alone."""
        listed = tuple(sorted({m for pair in self.inner for m in pair}))
        return (*listed, None), listed

    def _pairs(self) -> Iterator[tuple[int | None, OfModality, Pattern]]:
        modalities, listed = self._modalities
        for q, k in itertools.product(modalities, modalities):
            pattern = self.other if q is None or k is None else self.inner.get((q, k), self.other)
            yield q, OfModality(k, listed), pattern

    def views(self, key_set: KeySet, blocks: Blocks) -> tuple[View, ...]:
        """The keys of each modality, and the views of every inner pattern over them."""
        if key_set != AllKeys():
            raise ValueError("Boundary2D divides the keys itself and cannot be used inside a set of keys")
        return tuple(view for _, keys, pattern in self._pairs() for view in (keys, *pattern.views(keys, blocks)))

    def parts(self, scope: Scope) -> list[Part]:
        """For each query modality, the common refinement of its inner patterns' parts."""
        modalities, listed = self._modalities
        parts: list[Part] = []
        first_number = 0
        for m in modalities:
            queries = scope.restrict(OfModality(m, listed).holds(scope.geometry.queries))
            pairs = [(keys, pattern) for q, keys, pattern in self._pairs() if q == m]
            if all(pattern == Dense() for _, pattern in pairs):
                parts += Dense().parts(queries)  # one list of all keys, to which all such q blocks point
                continue
            per_key_set = [pattern.parts(queries.restrict(key_set=keys)) for keys, pattern in pairs]
            per_key_set = _numbered_apart(per_key_set, first_number)
            first_number = _next_number(per_key_set, first_number)
            parts += _joined(per_key_set)
        return parts


def _numbered_apart(per_pattern: Sequence[list[Part]], first_number: int = 0) -> list[list[Part]]:
    """The parts of several patterns, their gathered sets numbered on from pattern to pattern."""
    numbered: list[list[Part]] = []
    for parts in per_pattern:
        numbered.append(
            [
                dataclasses.replace(
                    part,
                    gathered=tuple(
                        dataclasses.replace(rows, number=first_number + rows.number) for rows in part.gathered
                    ),
                )
                for part in parts
            ]
        )
        first_number = _next_number(numbered, first_number)
    return numbered


def _next_number(per_pattern: Sequence[list[Part]], first_number: int) -> int:
    """The first number that no gathered set has."""
    numbers = [rows.number for parts in per_pattern for part in parts for rows in part.gathered]
    return max(numbers, default=first_number - 1) + 1


def _joined(per_key_set: Sequence[list[Part]]) -> list[Part]:
    """Parts of several patterns over disjoint keys, as parts that visit what all of them visit.

    Further passes of different patterns hold the same queries, so they become separate passes.
    """
    first_passes = [[part for part in parts if part.query_pass == 0] for parts in per_key_set]
    joined = [_intersection(choice) for choice in itertools.product(*first_passes)]
    next_pass = 1
    for parts in per_key_set:
        further = [part for part in parts if part.query_pass > 0]
        joined += [dataclasses.replace(part, query_pass=next_pass + part.query_pass - 1) for part in further]
        next_pass += max((part.query_pass for part in further), default=0)
    return joined


def _intersection(parts: tuple[Part, ...]) -> Part:
    def visits(q_blocks: QBlocks) -> list[Runs]:
        return [runs for part in parts for runs in _visits(part, q_blocks)]

    member = jnp.stack([part.member for part in parts]).all(axis=0)
    gathered = tuple(rows for part in parts for rows in part.gathered)
    order = next((part.order for part in parts if part.order is not None), None)  # any order is right, this one tight
    max_blocks = sum(part.max_blocks for part in parts)
    return Part(member=member, visits=visits, max_blocks=max_blocks, gathered=gathered, order=order)


def _visits(part: Part, q_blocks: QBlocks) -> list[Runs]:
    assert not isinstance(part.visits, Everything), "within a set of keys a part lists its runs"
    return part.visits(q_blocks)


class _Frozen[K, V](dict[K, V]):
    """A mapping that can be part of a static argument."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))

    def __setitem__(self, key: K, value: V) -> None:
        raise TypeError("a pattern's mapping is fixed once it is made")
