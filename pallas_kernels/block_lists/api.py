"""block_lists: the lists of visited kv blocks of one head, full ones first, empty ones pruned."""

from typing import Literal

from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.block_lists import reference, xla
from pallas_kernels.block_lists.inputs import BlockLists, ListInputs
from pallas_kernels.dispatch import run_backend

Implementation = Literal["xla", "reference"]

_BACKENDS = {"xla": xla.block_lists, "reference": reference.block_lists}

DEFAULT_ORDER: tuple[Implementation, ...] = ("xla",)
"""What `implementation=None` runs; the reference is for tests, on concrete arrays."""


def block_lists(inputs: ListInputs, *, implementation: Implementation | None = None) -> BlockLists:
    """The lists of one head; under `jax.vmap` all heads take one branch, and no two have a list in common.

    Six tokens in order, q blocks and kv blocks of 2 tokens. Every q block has a window of two tokens (interval 1 is
    `0 <= q_pos - kv_pos < 2`) and the last also the first block whole. The first q block's second block lies in its
    future and is pruned:

        runs of q block 0   start 0, 2 blocks, interval 1         mask   1 0 0 0 0 0
                        1   start 0, 2 blocks, interval 1                1 1 0 0 0 0
                        2   start 2, 2 blocks, interval 1                0 1 1 0 0 0
                            start 0, 1 block,  interval 0                0 0 1 1 0 0
                                                                         1 1 0 1 1 0
        start      0 2 4 | 0 | 0 2 | 0 2 4                               1 1 0 0 1 1
        interval   0 0 0 | 1 | 1 1 | 0 1 1
        first      3 4 6       the three shared blocks come first
        num_full   0 0 1       block 0 is full for queries 4 and 5
        count      1 2 3

    Args:
      inputs: runs, positions and sizes.
      implementation: a named backend runs or raises; None walks `DEFAULT_ORDER`.

    Raises:
      ValueError: the sizes do not fit each other, or the implementation's name is unknown.
      NotImplementedError: the reference is given traced arrays.
    """
    _check(inputs)
    return run_backend(_BACKENDS, DEFAULT_ORDER, implementation, inputs)


def _check(inputs: ListInputs) -> None:
    """Raises ValueError, with rule and got, for sizes that no backend could honour."""
    lengths = {len(pos) for pos in inputs.kv_pos}
    if len(lengths) != 1 or min(lengths) % inputs.blocks.granule:
        raise ValueError(f"rows of kv_pos must have one length, a multiple of {inputs.blocks.granule=}, got {lengths}")
    if not 0 <= inputs.num_shared * inputs.blocks.kv <= min(lengths):
        raise ValueError(f"{inputs.num_shared=} blocks must lie among the {min(lengths)} kv rows")
    if inputs.intervals[:1] != ((0, NO_LIMIT),):
        raise ValueError(f"the first interval must exclude nothing: expected {(0, NO_LIMIT)}, got {inputs.intervals}")
    if inputs.capacity < 1:
        raise ValueError(f"capacity must be at least one entry, got {inputs.capacity=}")
