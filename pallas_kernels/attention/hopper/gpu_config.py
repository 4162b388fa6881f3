"""HopperConfig: how the Hopper kernel cuts its work, and the shared memory that costs."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.hopper import ALLOCATION_BYTES, WGMMA_ROWS, tile_transforms

WARPGROUP_ROWS = WGMMA_ROWS
"""Query rows of one consumer warpgroup."""

COMPUTE_WARPGROUPS = 2
"""Consumer warpgroups: one has softmax to do while the other uses the tensor cores. A third would need q tiles
of 192 rows, and leave a thread 160 registers."""

TILE_Q = WARPGROUP_ROWS * COMPUTE_WARPGROUPS
"""Query rows of one work item."""

ROW_FIELDS = 32
"""int32 columns of the work table: TMA writes to shared memory at multiples of 128 bytes (PTX ISA)."""

STAGGERED_BLOCKS = 64
"""Full blocks from which a list counts as long: in shorter ones neighbours are soon apart by themselves (not tuned)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """Block sizes and buffers of the Hopper kernel.

    Args:
      tile_kv: kv rows of one step; divides the index's `block_kv`.
      num_k_stages, num_v_stages: tiles in flight; K is needed a step before V.
      num_q_buffers: 2 starts the next q tile while the last one is stored; 1 saves shared memory.
      ping_pong: whether the consumer warpgroups alternate by a barrier; without one they drift apart as well.
      stagger: full blocks by which a thread block starts further down a long list than its neighbour.
      fixed_max: whether bfloat16's full tiles do without a running maximum; see mosaic_gpu_kernel.py.
      lengths_per_octave: classes of list lengths between a length and twice it, by which q tiles are sorted; with fewer
        the heads of one kv head stay together longer.
    """

    tile_kv: int
    num_k_stages: int
    num_v_stages: int
    num_q_buffers: int = 2
    ping_pong: bool = False
    stagger: int = 0
    fixed_max: bool = True
    lengths_per_octave: int = 4

    def __post_init__(self):
        """Raises ValueError for sizes the kernel has no code for."""
        # A tile of 256 keys would take 128 of a thread's 240 registers for its scores alone. Both sizes are within the
        # 256 rows of a TMA box (CUDA driver API, cuTensorMapEncodeTiled, boxDim).
        if self.tile_kv not in (64, 128):
            raise ValueError(f"tile_kv must be 64 or 128, got {self.tile_kv=}")
        if min(self.num_k_stages, self.num_v_stages) < 2:
            raise ValueError(f"stages must be at least 2, got {self.num_k_stages=}, {self.num_v_stages=}")
        if self.stagger < 0:
            raise ValueError(f"stagger must be at least 0, got {self.stagger=}")
        if self.lengths_per_octave < 1:
            raise ValueError(f"lengths_per_octave must be at least 1, got {self.lengths_per_octave=}")
        if self.num_q_buffers not in (1, 2):
            raise ValueError(f"num_q_buffers must be 1 or 2, got {self.num_q_buffers=}")

    def buffers(self, head_dim: int, dtype: DTypeLike) -> dict[str, Any]:
        """The shared-memory arrays of the kernel, by name."""
        transforms = tile_transforms()
        # A tile for each warpgroup: its 64 rows arrive, are multiplied and leave as output apart from the other's.
        q_tile = (COMPUTE_WARPGROUPS, WARPGROUP_ROWS, head_dim)
        kv_tile = (self.tile_kv, head_dim)
        return {
            # Key positions of each K stage, then the q tiles' rows of the work table: together they round up to less.
            "ints": plgpu.SMEM((self.num_k_stages + 1, self.tile_kv), jnp.int32),
            "q": plgpu.SMEM((self.num_q_buffers, *q_tile), dtype, transforms=transforms),  # the output leaves from here
            # K and V are two rings, as a tile's K is free after QK and its V only a step later.
            "k": plgpu.SMEM((self.num_k_stages, *kv_tile), dtype, transforms=transforms),
            "v": plgpu.SMEM((self.num_v_stages, *kv_tile), dtype, transforms=transforms),
        }

    def barriers(self) -> dict[str, Any]:
        """The barriers of the kernel, by name: `x_ready` is filled by copies, `x_free` by the warpgroups that read."""
        return {
            # An arrival is one copy, once all its bytes are there, or one warpgroup. A q tile is ready with the rows of
            # both warpgroups and its row of the table.
            "q_ready": plgpu.Barrier(num_arrivals=1 + COMPUTE_WARPGROUPS, num_barriers=self.num_q_buffers),
            "q_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=self.num_q_buffers),
            "k_ready": plgpu.Barrier(num_barriers=self.num_k_stages),
            # A kv tile is ready with one copy, and free again when both warpgroups have read it.
            "k_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=self.num_k_stages),
            "v_ready": plgpu.Barrier(num_barriers=self.num_v_stages),
            "v_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=self.num_v_stages),
            "pos_ready": plgpu.Barrier(num_barriers=self.num_k_stages),
            # One barrier for each warpgroup's turn, at which the other one arrives.
            "ping_pong": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        }

    def shared_memory_bytes(self, head_dim: int, dtype: DTypeLike) -> int:
        """Shared memory of one thread block, from the declarations above."""
        arrays = sum(
            -(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // ALLOCATION_BYTES) * ALLOCATION_BYTES
            for x in self.buffers(head_dim, dtype).values()
        )
        # An mbarrier is a 64-bit object in shared memory (PTX ISA, "mbarrier").
        return arrays + 8 * sum(math.prod(b.num_barriers) for b in self.barriers().values())


CONFIGS = {
    # (padded head_dim, tile_kv): measured on one H200, see bench/RESULTS.md
    (64, 64): HopperConfig(tile_kv=64, num_k_stages=6, num_v_stages=6),
    (64, 128): HopperConfig(tile_kv=128, num_k_stages=4, num_v_stages=4),
    (128, 64): HopperConfig(tile_kv=64, num_k_stages=5, num_v_stages=4),
    # Two K stages are as fast as three (619 and 616 TFLOP/s, docs/log.md of 2026-11-22); a stage of K and of V is 64
    # KiB. `stagger`: see `_rotated` of mosaic_gpu_producer.py; where gpu_tuned.json has an entry, 0 was faster.
    (128, 128): HopperConfig(tile_kv=128, num_k_stages=2, num_v_stages=2, stagger=1),
    # A q tile is 64 KiB here and a stage of K and of V as much: with two q buffers they would need 256 KiB. The
    # accumulator takes 128 of a thread's 240 registers and leaves too few for the scores of 128 keys.
    (256, 64): HopperConfig(tile_kv=64, num_k_stages=2, num_v_stages=2, num_q_buffers=1),
}
"""The config of each head_dim and tile: a wider tile wherever the index's blocks and the registers allow it."""


HEAD_DIMS = (64, 128, 256)
"""Head dims the kernel runs at, whole swizzled rows of 64 numbers; others are padded to the next."""


def padded_head_dim(head_dim: int) -> int:
    """The head dim the kernel runs at: the next of `HEAD_DIMS`; ValueError above the last."""
    if head_dim > HEAD_DIMS[-1]:
        raise ValueError(f"head_dim must be at most {HEAD_DIMS[-1]}, got {head_dim}")
    return next(d for d in HEAD_DIMS if head_dim <= d)
