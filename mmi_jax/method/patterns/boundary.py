"""Boundary patterns: queries, or queries and keys, grouped by modality (paper sections 2.3 and 3.2, Alg. 2 and 3).

No-Boundary and K-Boundary heads need nothing special: an intra-modality pattern serves the whole prompt.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import jax.numpy as jnp

from mmi_jax.layout import VISION
from mmi_jax.method.kv_views import AllKeys, Group, OfModality, View
from mmi_jax.method.patterns.base import Pattern, Scope
from mmi_jax.method.patterns.dense import Dense
from mmi_jax.method.query_parts import Everything, Part, QBlocks, Runs
from pallas_kernels.block_lists.block_sizes import Blocks


@dataclasses.dataclass(frozen=True)
class QBoundary(Pattern):
    """Queries grouped by modality, each group with a pattern of its own over all keys.

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

    def __post_init__(self):
        """Stores `inner` in hashable form; raises ValueError for an empty mapping or a nested boundary."""
        object.__setattr__(self, "inner", _Frozen(self.inner))
        _check_inner(self)

    @property
    def reads_scores(self) -> bool:
        """Whether an inner pattern does."""
        return any(pattern.reads_scores for pattern in (*self.inner.values(), self.other))

    def views(self, group: Group, blocks: Blocks) -> tuple[View, ...]:
        """The views of every inner pattern."""
        return tuple(view for pattern in (*self.inner.values(), self.other) for view in pattern.views(group, blocks))

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        return _vision_blocks(self, num_kv_blocks, blocks)

    def parts(self, scope: Scope) -> list[Part]:
        """The inner patterns' parts."""
        listed = tuple(self.inner)
        patterns = [(OfModality(m, listed), pattern) for m, pattern in self.inner.items()]
        patterns.append((OfModality(None, listed), self.other))
        queries = scope.geometry.queries
        return [part for group, pattern in patterns for part in pattern.parts(scope.restrict(group.holds(queries)))]


@dataclasses.dataclass(frozen=True)
class Boundary2D(Pattern):
    """Queries and keys grouped by modality; each pair of modalities has a pattern of its own, one softmax over all.

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

    def __post_init__(self):
        """Stores `inner` in hashable form; raises ValueError for an empty mapping or a nested boundary."""
        object.__setattr__(self, "inner", _Frozen(self.inner))
        _check_inner(self)

    @property
    def _modalities(self) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
        """Modality groups, the unlisted rest last, and the listed modalities."""
        listed = tuple(sorted({m for pair in self.inner for m in pair}))
        return (*listed, None), listed

    def _pairs(self):
        groups, listed = self._modalities
        for q, k in itertools.product(groups, groups):
            pattern = self.other if q is None or k is None else self.inner.get((q, k), self.other)
            yield q, OfModality(k, listed), pattern

    @property
    def reads_scores(self) -> bool:
        """Whether an inner pattern does."""
        return any(pattern.reads_scores for pattern in (*self.inner.values(), self.other))

    def views(self, group: Group, blocks: Blocks) -> tuple[View, ...]:
        """The keys of each modality, and the views of every inner pattern over them."""
        if group != AllKeys():
            raise ValueError("Boundary2D groups the keys itself and cannot stand inside another group of keys")
        return tuple(view for _, keys, pattern in self._pairs() for view in (keys, *pattern.views(keys, blocks)))

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        return _vision_blocks(self, num_kv_blocks, blocks)

    def parts(self, scope: Scope) -> list[Part]:
        """For each query modality, the common refinement of its inner patterns' parts."""
        groups, listed = self._modalities
        by_query = {m: [] for m in groups}
        for m, keys, pattern in self._pairs():
            by_query[m].append((keys, pattern))
        parts = []
        for m, pairs in by_query.items():
            own = scope.restrict(OfModality(m, listed).holds(scope.geometry.queries))
            if all(pattern == Dense() for _, pattern in pairs):
                parts += Dense().parts(own)  # one list of all keys, which such queries share
            else:
                parts += _joined([pattern.parts(own.restrict(group=keys)) for keys, pattern in pairs])
        return parts


def _joined(per_key_group: list[list[Part]]) -> list[Part]:
    """Parts of several patterns over disjoint keys, as parts that visit what all of them visit.

    Repeated views of different patterns hold the same queries, so they become views of their own.
    """
    first_views = [[part for part in parts if part.view == 0] for parts in per_key_group]
    joined = [_intersection(choice) for choice in itertools.product(*first_views)]
    next_view = 1
    for parts in per_key_group:
        repeated = [part for part in parts if part.view > 0]
        joined += [dataclasses.replace(part, view=next_view + part.view - 1) for part in repeated]
        next_view += max((part.view for part in repeated), default=0)
    return joined


def _intersection(parts: tuple[Part, ...]) -> Part:
    def visits(q_blocks: QBlocks) -> list[Runs]:
        return [runs for part in parts for runs in _visits(part, q_blocks)]

    member = jnp.stack([part.member for part in parts]).all(axis=0)
    columns = tuple(columns for part in parts for columns in part.columns)
    order = next((part.order for part in parts if part.order is not None), None)  # any order is right, this one tight
    max_blocks = sum(part.max_blocks for part in parts)
    return Part(member=member, visits=visits, max_blocks=max_blocks, columns=columns, order=order)


def _visits(part: Part, q_blocks: QBlocks) -> list[Runs]:
    assert not isinstance(part.visits, Everything), "inside a group of keys a part lists its runs"
    return part.visits(q_blocks)


def _vision_blocks(pattern: "QBoundary | Boundary2D", num_kv_blocks: int, blocks: Blocks) -> float | None:
    """What vision queries visit, who are most of a long prompt; what any query may if none are listed."""
    items = [(key if isinstance(key, int) else key[0], inner) for key, inner in pattern.inner.items()]
    listed = [inner for modality, inner in items if modality == VISION] or [inner for _, inner in items]
    visited = [inner.typical_blocks(num_kv_blocks, blocks) for inner in listed]
    return None if None in visited else max(x for x in visited if x is not None)


class _Frozen(dict):
    """A mapping that can be part of a static argument."""

    def __hash__(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))

    def __setitem__(self, key, value):
        raise TypeError("a pattern's mapping is fixed once it is made")


def _check_inner(pattern: QBoundary | Boundary2D) -> None:
    name = type(pattern).__name__
    if not pattern.inner:
        raise ValueError(f"{name}.inner must map at least one modality to a pattern, got an empty mapping")
    for key, inner in (*pattern.inner.items(), ("other", pattern.other)):
        if isinstance(inner, QBoundary | Boundary2D) or not isinstance(inner, Pattern):
            raise ValueError(f"{name}.inner[{key!r}] must be an intra-modality pattern, got {inner!r}")
