"""The rules of Hopper GPUs that all Mosaic GPU kernels here follow: tensor-core shapes, shared memory, layouts."""

from typing import Any

from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.notation import Array

WGMMA_ROWS = 64
"""Rows of a product by one warpgroup: every wgmma instruction has M = 64 (PTX ISA, "wgmma.mma_async")."""

WGMMA_COLUMNS = 8
"""Columns of a product are a multiple of these: wgmma has N = 8, 16, ... 256 (PTX ISA, "wgmma.mma_async")."""

SHARED_MEMORY_BYTES = 227 * 1024
"""What one thread block may use on compute capability 9.0 (CUDA programming guide, table of compute capabilities)."""

ALLOCATION_BYTES = 1024
"""Mosaic GPU starts every buffer at a multiple of this: a 128-byte swizzle repeats every 8 rows of 128 bytes."""

SWIZZLE_BYTES = 128
"""Width of a swizzled row, 64 numbers of 16 bits: the widest that TMA and wgmma know (PTX ISA, "Swizzling modes")."""


def tile_transforms() -> tuple[Any, ...]:
    """How 16-bit tiles lie in shared memory so that wgmma reads them without bank conflicts.

    In pieces of 8 rows by 128 bytes (wgmma's core matrices side by side), swizzled within each.
    """
    # TMA's innermost side may be no wider than the swizzle (CUDA driver API, cuTensorMapEncodeTiled): wider rows are
    # cut into pieces of 64 numbers.
    transforms: Any = plgpu.TilingTransform, plgpu.SwizzleTransform  # abstract, to a type checker
    return transforms[0]((8, SWIZZLE_BYTES // 2)), transforms[1](SWIZZLE_BYTES)


def columns(x: Array, shape: tuple[int, ...]) -> Array:
    """A value per row, repeated along the columns."""
    # In registers nothing moves: the threads that hold a row of an accumulator hold the row's value too.
    return lax.broadcast_in_dim(x, shape, [0])
