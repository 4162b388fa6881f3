"""The body of the Hopper kernel: one tile of columns of one layer's matrix, a split of its rows.

The product is transposed, `w^T x^T`: the matrix's columns are the rows of wgmma's result (M = 128), the rows of x its
columns (N = 8 for up to eight prompts). What a thread block does is stream its split of the matrix through shared
memory, several tiles in flight; the tensor cores are idle most of the time.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import SWIZZLE_BYTES, WGMMA_ROWS
from pallas_kernels.notation import Array, Ref, Scalar

STEP = SWIZZLE_BYTES // 2
"""Rows of the matrix of one step: of x, one swizzled row of 64 numbers."""

TILE_COLUMNS = 2 * WGMMA_ROWS
"""Columns of the matrix of one thread block: the rows of two wgmma instructions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulShape:
    """What the body knows when it is traced.

    Args:
      num_tiles: tiles of columns.
      num_splits: thread blocks that split the rows of one.
      num_steps: steps of all rows of a layer's matrix.
      num_rows: rows of x, rounded up to 8: wgmma's N is a multiple of 8.
      num_stages: tiles in shared memory.
    """

    num_tiles: int
    num_splits: int
    num_steps: int
    num_rows: int
    num_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Every array by name: device memory, then shared memory and barriers. `w` is `[layers * e, f]`."""

    layer: Ref
    x: Ref
    w: Ref
    out: Ref
    x_tiles: Ref
    w_tiles: Ref
    ready: Ref


def matmul_kernel(refs: Refs, shape: MatmulShape) -> None:
    """Runs one thread block: see the module's first lines. Tiles of one split side by side read whole rows."""
    program = lax.axis_index("program")
    split = program // shape.num_tiles
    columns = _aligned(program % shape.num_tiles, TILE_COLUMNS)
    first, end = (n * shape.num_steps // shape.num_splits for n in (split, split + 1))
    layer_start = refs.layer[0] * shape.num_steps

    def load(n: Array) -> None:
        slot, number = n % shape.num_stages, first + n
        ready = refs.ready.at[slot]
        plgpu.copy_gmem_to_smem(refs.w.at[_aligned(layer_start + number, STEP), columns], refs.w_tiles.at[slot], ready)
        plgpu.copy_gmem_to_smem(refs.x.at[:, _aligned(number, STEP)], refs.x_tiles.at[slot], ready)

    # All stages but one are filled at the start; each step then fills the slot of the step before.
    for n in range(shape.num_stages - 1):
        pl.when(n < end - first)(lambda n=n: load(jnp.int32(n)))

    def multiply(accumulator: Ref) -> Array:
        def step(n: Array, carry: Scalar) -> Scalar:
            slot = n % shape.num_stages
            plgpu.barrier_wait(refs.ready.at[slot])
            w_tile, x_tile = (tiles.at[slot].transpose((1, 0)) for tiles in (refs.w_tiles, refs.x_tiles))
            # The matrix lies along its columns, M, and not along the rows that are summed over: wgmma reads 16-bit
            # sides in either order, so that nothing is transposed.
            plgpu.wgmma(accumulator, w_tile, x_tile)
            plgpu.wgmma_wait(1)  # the product before this one is done, and its slot is free
            ahead = n + shape.num_stages - 1
            pl.when(ahead < end - first)(lambda: load(ahead))
            return carry

        lax.fori_loop(0, end - first, step, 0)
        return accumulator[...]

    size = TILE_COLUMNS, shape.num_rows
    # From registers to device memory: a few numbers a thread, next to the matrix's tiles that were read.
    refs.out[split, columns] = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(size, jnp.float32))


def _aligned(number: Array, size: int) -> pl.Slice:
    return pl.ds(pl.multiple_of(number * size, size), size)
