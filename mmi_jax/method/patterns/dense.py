"""Dense: every query sees every key before it."""

import dataclasses

from mmi_jax.method.patterns.base import FixedPattern
from mmi_jax.method.patterns.runs import all_keys_part, mean_up_to
from mmi_jax.method.query_parts import Part, Scope
from pallas_kernels.block_lists.block_sizes import Blocks


@dataclasses.dataclass(frozen=True)
class Dense(FixedPattern):
    """Causal attention, nothing left out.

    1 0 0 0
    1 1 0 0
    1 1 1 0
    1 1 1 1
    """

    def typical_blocks(self, num_kv_blocks: int, blocks: Blocks) -> float | None:
        """Kv blocks that a q block typically visits, see `Pattern`."""
        return mean_up_to(num_kv_blocks, num_kv_blocks)

    def parts(self, scope: Scope) -> list[Part]:
        """One part that sees everything."""
        return [all_keys_part(scope)]
