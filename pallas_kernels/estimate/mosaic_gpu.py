"""column_mass on Hopper GPUs: checks, padding and the launches of the two passes."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.gpu_config import has_hopper_gpu
from pallas_kernels.estimate.mosaic_gpu_kernel import (
    NUM_QUERIES,
    TILE_KEYS,
    EstimateShape,
    Refs,
    lse_pass,
    mass_pass,
)
from pallas_kernels.notation import Array, Float, Int32

NUM_PROGRAMS = 8 * 132
"""Thread blocks of a launch, about: several for each multiprocessor hide each other's waits."""


def column_mass(
    q: Float[Array, "h q d"], k: Float[Array, "s g d"], kv_head: Int32[Array, " h"], *,
    q_pos: Int32[Array, "h q"], kv_pos: Int32[Array, "n s"], scale: float,
) -> Float[Array, "h s"]:  # fmt: skip
    """Attention mass per key, see `api.column_mass`.

    Raises:
      NotImplementedError: no Hopper GPU is the default device, or `check_supported` refuses.
    """
    if not has_hopper_gpu():
        raise NotImplementedError(f"mosaic_gpu needs a GPU of compute capability 9.x, got {jax.default_backend()=}")
    check_supported(q, k, scale)
    return launch(q, k, kv_head, q_pos=q_pos, kv_pos=kv_pos, scale=scale)


def check_supported(q, k, scale: float) -> None:
    """Raises NotImplementedError, with limit and value, for what the kernel cannot take."""
    limits = [
        (q.dtype == k.dtype and q.dtype in (jnp.bfloat16, jnp.float16),
         f"q and k must be both bfloat16 or both float16, got {q.dtype}, {k.dtype}"),
        (q.shape[2] in (64, 128, 256), f"head_dim must be 64, 128 or 256, got {q.shape[2]}"),
        (q.shape[1] <= NUM_QUERIES, f"a head may have at most {NUM_QUERIES} queries, got {q.shape[1]}"),
        (k.shape[0] % TILE_KEYS == 0, f"keys must be a multiple of {TILE_KEYS}, got {k.shape[0]}"),
        (scale > 0, f"scale must be positive, got {scale}"),
    ]  # fmt: skip
    for holds, message in limits:
        if not holds:
            raise NotImplementedError(f"mosaic_gpu: {message}")


def launch(q, k, kv_head, *, q_pos, kv_pos, scale: float, num_programs: int = NUM_PROGRAMS) -> Float[Array, "h s"]:
    """Runs both passes."""
    missing = NUM_QUERIES - q.shape[1]
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0)))
    q_pos = jnp.pad(q_pos, ((0, 0), (0, missing)), constant_values=-1)
    num_heads, (num_keys, num_kv_heads) = q.shape[0], k.shape[:2]
    num_tiles = num_keys // TILE_KEYS
    tiles_per_program = -(-num_tiles // max(1, num_programs // num_heads))
    shape = EstimateShape(
        num_heads=num_heads,
        tiles_per_program=tiles_per_program,
        num_tiles=num_tiles,
        kv_heads_per_row=num_kv_heads // kv_pos.shape[0],
        score_scale=scale * math.log2(math.e),
    )
    arrays = (q, k, kv_head, q_pos, kv_pos)
    num_shares = -(-num_tiles // tiles_per_program)
    partial = jax.ShapeDtypeStruct((num_heads, num_shares, NUM_QUERIES), jnp.float32)
    top, total = _launch(lse_pass, arrays, shape, num_shares, (partial, partial))
    highest = jnp.max(top, axis=1)
    lse = highest + jnp.log2(jnp.sum(total * jnp.exp2(top - highest[:, None]), axis=1))
    (mass,) = _launch(
        mass_pass, (*arrays, lse), shape, num_shares, (jax.ShapeDtypeStruct((num_heads, num_keys), jnp.float32),)
    )
    return mass


def _launch(body: Callable[..., None], arrays, shape: EstimateShape, num_shares: int, out_type: Any):
    q = arrays[0]
    tile_transforms: Any = plgpu.TilingTransform, plgpu.SwizzleTransform  # abstract, to a type checker
    transforms = tile_transforms[0]((8, 64)), tile_transforms[1](128)
    scratch = [
        plgpu.SMEM((NUM_QUERIES, q.shape[2]), q.dtype, transforms=transforms),
        plgpu.SMEM((2, TILE_KEYS, q.shape[2]), q.dtype, transforms=transforms),
        plgpu.Barrier(),
        plgpu.Barrier(num_barriers=2),
    ]

    def column_mass(*refs):
        ends = len(arrays), len(arrays) + len(out_type)
        q_tile, k_tiles, q_ready, k_ready = refs[ends[1] :]
        names = dict(zip(("q", "k", "kv_head", "q_pos", "kv_pos"), refs, strict=False))
        given = Refs(q_tile=q_tile, k_tiles=k_tiles, q_ready=q_ready, k_ready=k_ready, **names)
        body(given, *refs[5 : ends[1]], shape)

    run = plgpu.kernel(
        column_mass,
        out_type=out_type,
        scratch_types=scratch,
        grid=(shape.num_heads * num_shares,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return run(*arrays)
