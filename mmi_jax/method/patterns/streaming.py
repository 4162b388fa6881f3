"""A-shape and Tri-shape: sinks and a local window, fixed before the prompt is seen (StreamingLLM; paper App. C.3)."""

import dataclasses
from typing import ClassVar

from mmi_jax.method.checks import check_at_least
from mmi_jax.method.patterns.base import Family, FixedPattern, Pattern, in_tokens
from mmi_jax.method.patterns.runs import all_keys_part, last_members, mean_up_to, sink_and_window
from mmi_jax.method.query_parts import Part, Scope
from pallas_kernels.block_lists.block_sizes import Blocks


@dataclasses.dataclass(frozen=True)
class AShape(FixedPattern):
    """Attention sinks at the start and a local window before each query.

    `AShape(sink=1, local=2)` over 6 tokens:

        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 0 1 1 0 0
        1 0 0 1 1 0
        1 0 0 0 1 1

    Args:
      sink: first keys that everyone sees, rounded up to whole kv blocks; tokens (Table 3: 128).
      local: nearest keys, the query's included, exact to the token (Table 3: 4096).
    """

    sink: int = in_tokens(128)
    local: int = in_tokens(4096)

    family: ClassVar = Family(
        name="a-shape", make=lambda size: AShape(sink=128, local=size), min_size=16, step=16, published=4096
    )

    @classmethod
    def example(cls) -> "AShape":
        """An instance for a prompt of about a hundred tokens."""
        return cls(sink=4, local=12)

    @classmethod
    def search_candidates(cls) -> tuple[Pattern, ...]:
        """A cheaper window than those of Table 4."""
        return (cls(sink=128, local=256),)

    def __post_init__(self):
        """Raises ValueError for a negative sink or a window without the query itself."""
        check_at_least(self, sink=0, local=1)

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        return mean_up_to(window_blocks(self.sink, self.local, blocks), num_kv_blocks)

    def parts(self, scope: Scope) -> list[Part]:
        """One part in prompt order."""
        return [window_part(scope, self.sink, self.local)]


@dataclasses.dataclass(frozen=True)
class TriShape(FixedPattern):
    """A-shape whose last queries see everything.

    `TriShape(sink=1, local=2, last=1)` over 6 tokens:

        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 0 1 1 0 0
        1 0 0 1 1 0
        1 1 1 1 1 1

    Args:
      sink, local: as in `AShape`.
      last: queries at the end of the prompt that see every key (Table 3: 128).
    """

    sink: int = in_tokens(128)
    local: int = in_tokens(4096)
    last: int = in_tokens(128)

    family: ClassVar = Family(
        name="tri-shape", make=lambda size: TriShape(sink=128, local=size), min_size=16, step=16, published=4096
    )

    @classmethod
    def example(cls) -> "TriShape":
        """An instance for a prompt of about a hundred tokens."""
        return cls(sink=4, local=12, last=10)

    @classmethod
    def search_candidates(cls) -> tuple[Pattern, ...]:
        """The windows of `AShape` with the last queries dense."""
        return cls(sink=128, local=256), cls(sink=128, local=1024)

    def __post_init__(self):
        """Raises ValueError for sizes out of range."""
        check_at_least(self, sink=0, local=1, last=1)

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        window = mean_up_to(window_blocks(self.sink, self.local, blocks), num_kv_blocks)
        return window + self.last / blocks.q  # so many rows of `num_kv_blocks`, over as many rows

    def parts(self, scope: Scope) -> list[Part]:
        """The window's part and the last queries' part."""
        is_last = last_members(scope.member, self.last)
        return [
            window_part(scope.restrict(~is_last), self.sink, self.local),
            all_keys_part(scope.restrict(is_last)),
        ]


def window_blocks(sink: int, local: int, blocks: Blocks) -> int:
    """Kv blocks that a q block touches for sinks and a local window."""
    return -(-sink // blocks.kv) + -(-(local + blocks.q) // blocks.kv) + 1


def window_part(scope: Scope, sink: int, local: int) -> Part:
    """The scope's members, each seeing the sinks and its local window."""
    blocks = scope.blocks
    return Part(
        member=scope.member,
        visits=lambda q_blocks: sink_and_window(scope.view, q_blocks, sink, local, blocks),
        max_blocks=scope.bound(window_blocks(sink, local, blocks) + 1) + scope.num_kv_blocks,
    )
