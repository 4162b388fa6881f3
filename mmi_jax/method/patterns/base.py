"""Step 5 of 9, patterns: what every pattern of the method is. One file each; `patterns/__init__.py` registers them."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from mmi_jax.layout import TokenIndex, TokenLayout
from mmi_jax.method.checks import check_example
from mmi_jax.method.kv_views import KeySet, View
from mmi_jax.method.plan import Plan, plan_example
from mmi_jax.method.query_parts import Part, Scope
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import Array, Float

SCALED_STEP = 16
"""Scaled sizes are multiples of this, and at least as large; tokens. One granule of the default blocks."""


def in_tokens(default: int) -> Any:
    """A field that counts tokens and grows with the prompt, see `Pattern.scaled`."""
    return dataclasses.field(default=default, metadata={"unit": "tokens"})


def in_blocks(default: int) -> Any:
    """A field that counts kv blocks and grows with the prompt, see `Pattern.scaled`."""
    return dataclasses.field(default=default, metadata={"unit": "blocks"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Patterns of one kind from small to large, so that the kind can be run at any cost.

    Args:
      name: as commands know the kind.
      make: the pattern of a size.
      min_size: smallest size.
      step: sizes are multiples of it.
      unit: tokens that one unit of a size stands for: the largest size is the prompt's length in these.
      published: the size of the paper's comparison (Table 3); None where it is the tokens of a frame.
    """

    name: str
    make: Callable[[int], "Pattern"]
    min_size: int
    step: int = 1
    unit: int = 1
    published: int | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pattern(abc.ABC):
    """What one head attends to. A subclass is a frozen dataclass, hashable, static under jit.

    A new pattern is one file with `parts`, and `views` if it needs the keys in another order than the prompt's, and one
    line in `patterns/__init__.py`. What else it says of itself (`typical_blocks`, `family`, `search_candidates`) is
    read by the cost model and the search.
    """

    family: ClassVar[Family | None] = None
    """Its sizes, for comparisons at equal cost; None if it has no single size."""

    @classmethod
    def example(cls) -> "Pattern":
        """An instance for a prompt of about a hundred tokens: for pictures and tests."""
        return cls()

    @classmethod
    def search_candidates(cls) -> tuple["Pattern", ...]:
        """Instances that a search tries on every head in addition to the paper's Table 4."""
        return ()

    @property
    def reads_scores(self) -> bool:
        """Whether `parts` reads q or k; if not, one plan serves all heads of the pattern."""
        return True

    def views(self, key_set: KeySet, blocks: Blocks) -> tuple[View, ...]:
        """Key views that `parts` will name, when the keys are those of `key_set`."""
        return ()

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks, of `num_kv_blocks`, that a q block typically visits, for cost models; None if unknown."""
        return None

    @abc.abstractmethod
    def parts(self, scope: Scope) -> list[Part]:
        """Parts of the scope's queries; those of pass 0 hold each member once."""

    def scaled(self, factor: float) -> "Pattern":
        """The pattern for prompts `factor` times as long: sizes in tokens multiplied, blocks too but at least two."""
        sizes: dict[str, int] = {}
        for field in dataclasses.fields(self):
            size, unit = getattr(self, field.name), field.metadata.get("unit")
            if unit == "tokens":
                sizes[field.name] = max(SCALED_STEP, round(size * factor / SCALED_STEP) * SCALED_STEP)
            elif unit == "blocks":
                sizes[field.name] = max(2, round(size * factor))
        return dataclasses.replace(self, **sizes)

    def plan(
        self,
        q: Float[Array, "t h d"],
        k: Float[Array, "s g d"],
        layout: TokenLayout,
        *,
        q_start: TokenIndex | None = None,
        scale: float | None = None,
        blocks: Blocks | None = None,
    ) -> Plan:
        """The plan of one example in which every head has this pattern.

        Args:
          q, k: queries of all heads and keys of all kv heads, in prompt order.
          layout: of the `s` kv tokens, fields [s].
          q_start: the kv token that is the first query; `s - t` when None.
          scale: factor on the scores that estimates read, `d ** -0.5` when None.
          blocks: tile sizes, 128 x 128 when None.

        Raises:
          ValueError: shapes or layout do not fit each other.
        """
        check_example(q, k, layout, q_start)
        return plan_example(
            (self,) * q.shape[1],
            q,
            k,
            layout,
            k.shape[0] - q.shape[0] if q_start is None else q_start,
            scale=float(q.shape[-1] ** -0.5) if scale is None else scale,
            blocks=blocks or Blocks(),
        )


class FixedPattern(Pattern):
    """A pattern that is fixed before the prompt is seen: one plan serves all of its heads."""

    @property
    def reads_scores(self) -> bool:
        """False: positions and modalities decide."""
        return False
