"""layer_matmul on Hopper GPUs: checks, padding of the rows, the launch, and the sum over splits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import NUM_MULTIPROCESSORS, check_hopper_gpu
from pallas_kernels.hopper import tile_transforms
from pallas_kernels.layer_matmul.mosaic_gpu_kernel import STEP, TILE_COLUMNS, MatmulShape, Refs, matmul_kernel
from pallas_kernels.notation import Array, Float, Int32, Ref

MAX_ROWS = 64
"""Rows of x; with more, cuBLAS is no longer bound by reading the matrix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulConfig:
    """How the rows of a matrix are split.

    Args:
      num_stages: tiles of the matrix that a thread block holds, one of which is computed on.
      blocks_per_multiprocessor: thread blocks of the launch for each multiprocessor, at most: all run at once.
    """

    # A stage is 16 KiB of the matrix and 1 KiB of x for up to eight prompts: four of them in three thread blocks are
    # 204 of a multiprocessor's 227 KiB.
    num_stages: int = 4
    blocks_per_multiprocessor: int = 3


def layer_matmul(x: Float[Array, "b e"], w: Float[Array, "layers e f"], layer: Int32[Array, ""]) -> Float[Array, "b f"]:
    """See `api.layer_matmul`.

    Raises:
      NotImplementedError: no Hopper GPU is the default device, or `check_supported` refuses.
    """
    check_hopper_gpu()
    check_supported(x, w)
    return launch(x, w, layer, MatmulConfig())


def check_supported(x: Float[Array, "b e"], w: Float[Array, "layers e f"]) -> None:
    """Raises NotImplementedError, with limit and value, for what the kernel cannot take."""
    limits = [
        (x.dtype in (jnp.bfloat16, jnp.float16), f"x and w must be bfloat16 or float16, got {x.dtype}"),
        (x.shape[0] <= MAX_ROWS, f"x may have at most {MAX_ROWS} rows, got {x.shape[0]}"),
        (w.shape[1] % STEP == 0, f"rows of the matrix must be a multiple of {STEP}, got {w.shape[1]}"),
        (w.shape[2] % TILE_COLUMNS == 0, f"its columns must be a multiple of {TILE_COLUMNS}, got {w.shape[2]}"),
        # TMA's coordinates are 32-bit integers (PTX ISA, "cp.async.bulk.tensor").
        (math.prod(w.shape[:2]) < 2**31, f"rows of all layers must count below 2**31, got {w.shape[:2]}"),
    ]
    for holds, message in limits:
        if not holds:
            raise NotImplementedError(f"mosaic_gpu: {message}")


def launch(
    x: Float[Array, "b e"],
    w: Float[Array, "layers e f"],
    layer: Int32[Array, ""],
    config: MatmulConfig,
    *,
    num_splits: int | None = None,
) -> Float[Array, "b f"]:
    """Runs the kernel and sums the splits.

    Args:
      num_splits: thread blocks along each tile of columns; as many as `config` puts on the chip when None.
    """
    b, num_columns, num_steps = x.shape[0], w.shape[2], w.shape[1] // STEP
    num_tiles = num_columns // TILE_COLUMNS
    # One wave of thread blocks: reading runs at the memory's rate as long as all of them have copies in flight.
    splits = config.blocks_per_multiprocessor * NUM_MULTIPROCESSORS // num_tiles if num_splits is None else num_splits
    shape = MatmulShape(
        num_tiles=num_tiles,
        num_splits=min(max(1, splits), num_steps),
        num_steps=num_steps,
        num_rows=-(-b // 8) * 8,
        num_stages=config.num_stages,
    )
    x_rows = jnp.pad(x, ((0, shape.num_rows - b), (0, 0)))
    # All layers' rows are one axis, and the layer an offset: the matrix is not sliced out of the stack, which XLA does
    # by a copy (docs/log.md of 2026-11-26, decoding).
    out = _run(layer[None], x_rows, w.reshape(-1, num_columns), shape)
    # Splits in float32, and no atomic additions: the result does not depend on who ends first.
    return jnp.sum(out, axis=0)[:, :b].T.astype(x.dtype)


def _run(
    layer: Int32[Array, "1"], x: Float[Array, "b e"], w: Float[Array, "rows f"], shape: MatmulShape
) -> Float[Array, "splits f b"]:
    """Partial products over each split of the matrix's rows."""
    transforms = tile_transforms()
    scratch: dict[str, Ref] = dict(
        x_tiles=plgpu.SMEM((shape.num_stages, shape.num_rows, STEP), x.dtype, transforms=transforms),
        w_tiles=plgpu.SMEM((shape.num_stages, STEP, TILE_COLUMNS), x.dtype, transforms=transforms),
        # Two arrivals: a tile of the matrix and one of x.
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=shape.num_stages),
    )

    def layer_matmul(*refs: Ref) -> None:
        matmul_kernel(Refs(**dict(zip(("layer", "x", "w", "out", *scratch), refs, strict=True))), shape)

    run = plgpu.kernel(
        layer_matmul,
        out_type=jax.ShapeDtypeStruct((shape.num_splits, w.shape[1], shape.num_rows), jnp.float32),
        scratch_types=tuple(scratch.values()),
        grid=(shape.num_tiles * shape.num_splits,),
        grid_names=("program",),
    )
    return run(layer, x, w)
