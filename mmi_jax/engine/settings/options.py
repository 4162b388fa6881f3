"""PrefillOptions: every setting of a prefill, in one frozen value that is passed down whole.

The public functions (`prefill`, `prefill_many`, `prepare`) take the settings either way: as keywords, for a call that
stands alone, or as `options=PrefillOptions(...)`, for a value that is built once and handed to several of them.
Keywords become one `PrefillOptions` at the door (`options_of`), and nothing below lists the settings again. A
`TypedDict` gives the keywords their types (PEP 692), so that editors and type checkers know them without three
signatures that repeat them; a test holds its keys to the fields of the dataclass.

What belongs to one call and not to its settings stays a parameter of the function: the prompt, the cache it continues,
the tokens whose logits are computed, and the functions that are called back.
"""

import dataclasses
import operator
from typing import TypedDict

from jax.sharding import Mesh

from mmi_jax.engine.settings.buckets import Buckets, default_buckets
from mmi_jax.method.dispatch import Vendor
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.tables.pattern_table import PatternTable
from mmi_jax.sharding import Shards
from pallas_kernels.attention.api import Backend
from pallas_kernels.block_lists.block_sizes import Blocks


class PrefillSettings(TypedDict, total=False):
    """The fields of `PrefillOptions` as keywords, which is where they are described."""

    table: PatternTable | Pattern | None
    chunk_tokens: int | None
    max_new_tokens: int
    buckets: Buckets | None
    blocks: Blocks | None
    implementation: Backend | Vendor | None
    measures_recall: bool
    may_run_dense: bool
    mesh: Mesh | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillOptions:
    """The settings of a prefill.

    Args:
      table: a pattern for each layer and head, one pattern for all, or None for dense attention.
      chunk_tokens: prompt tokens that go through the layers at once, a multiple of the block size; all when None.
        Dense attention gives the same result for any value. A sparse plan is made per chunk from the chunk's last
        queries, so a dynamic pattern may choose other columns, diagonals or phases in each chunk, and "the last
        queries" of Tri-shape are each chunk's.
      max_new_tokens: capacity to leave in the cache for decoding, or for what will follow.
      buckets: padded lengths; those of the device or the mesh when None.
      blocks: tile sizes; the default ones when None.
      implementation: see `attend_sparsely`.
      measures_recall: estimate per head the fraction of attention kept, which costs `64 / t` of dense attention.
      may_run_dense: heads, or whole layers, for which the device's cost model expects dense attention to be faster at
        this length run dense; the report names the patterns that ran. Where nothing was measured the table runs as it
        is.
      mesh: splits the prompt, the weights and the cache over its devices; see `mmi_jax.sharding`, `make_mesh` and
        `shard_model`. The whole prompt runs at once. Dense attention and static patterns give what one device gives,
        except "the last queries" of Tri-shape, which are each piece's; so are those that a dynamic pattern estimates
        from, and it may choose other columns, diagonals or phases for each piece.

    Raises:
      ValueError: a number of tokens is not a whole number.
    """

    table: PatternTable | Pattern | None = None
    chunk_tokens: int | None = None
    max_new_tokens: int = 0
    buckets: Buckets | None = None
    blocks: Blocks | None = None
    implementation: Backend | Vendor | None = None
    measures_recall: bool = True
    may_run_dense: bool = True
    mesh: Mesh | None = None

    def __post_init__(self):
        """Whole numbers of any type, NumPy's too, become Python's; raises ValueError for another value."""
        object.__setattr__(self, "max_new_tokens", whole_number("max_new_tokens", self.max_new_tokens))
        if self.chunk_tokens is not None:
            object.__setattr__(self, "chunk_tokens", whole_number("chunk_tokens", self.chunk_tokens))

    @property
    def block_sizes(self) -> Blocks:
        """The tile sizes that run."""
        return self.blocks or Blocks()

    def buckets_on(self, shards: Shards) -> Buckets:
        """The padded lengths of a prefill that is split so."""
        return self.buckets or default_buckets(self.block_sizes, shards)


def options_of(options: PrefillOptions | None, settings: PrefillSettings) -> PrefillOptions:
    """The options with these keywords in place of theirs; a keyword that is no setting raises TypeError."""
    return dataclasses.replace(options or PrefillOptions(), **settings)


def whole_number(name: str, value: int) -> int:
    """A whole number of any type, NumPy's too, as Python's; raises ValueError for another value."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
