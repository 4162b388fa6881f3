"""A-shape and Tri-shape: sinks and a local window, fixed before the prompt is seen (StreamingLLM; paper App. C.3)."""

import dataclasses

from mmi_jax.parts import Part, last_members, sink_and_window
from mmi_jax.patterns.base import Pattern, Scope
from mmi_jax.patterns.checks import check_at_least
from mmi_jax.patterns.dense import all_keys_part


@dataclasses.dataclass(frozen=True)
class AShape(Pattern):
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
      local: nearest keys, the query's own included, exact to the token (Table 3: 4096).
    """

    sink: int = 128
    local: int = 4096

    def __post_init__(self):
        """Raises ValueError for a negative sink or a window without the query itself."""
        check_at_least(self, sink=0, local=1)

    @property
    def reads_scores(self) -> bool:
        """False: fixed before the prompt is seen."""
        return False

    def parts(self, scope: Scope) -> list[Part]:
        """One part in prompt order."""
        return [window_part(scope, self.sink, self.local)]


@dataclasses.dataclass(frozen=True)
class TriShape(Pattern):
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

    sink: int = 128
    local: int = 4096
    last: int = 128

    def __post_init__(self):
        """Raises ValueError for sizes out of range."""
        check_at_least(self, sink=0, local=1, last=1)

    @property
    def reads_scores(self) -> bool:
        """False: fixed before the prompt is seen."""
        return False

    def parts(self, scope: Scope) -> list[Part]:
        """The window's part and the last queries' part."""
        is_last = last_members(scope.member, self.last)
        return [
            window_part(scope.restrict(~is_last), self.sink, self.local),
            all_keys_part(scope.restrict(is_last)),
        ]


def window_part(scope: Scope, sink: int, local: int) -> Part:
    """The scope's members, each seeing the sinks and its local window."""
    blocks = scope.blocks
    per_q_block = -(-sink // blocks.kv) + -(-(local + blocks.q) // blocks.kv) + 2
    return Part(
        member=scope.member,
        visits=lambda q_blocks: sink_and_window(scope.view, q_blocks, sink, local, blocks),
        max_blocks=scope.bound(per_q_block) + scope.num_kv_blocks,
    )
