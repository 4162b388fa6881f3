"""column_mass and line_mass on Hopper GPUs: checks, padding and the launches of the passes."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import NUM_MULTIPROCESSORS, check_hopper_gpu
from pallas_kernels.estimate.mosaic_gpu_kernel import (
    MIN_TILE,
    NUM_QUERIES,
    EstimateShape,
    Refs,
    line_pass,
    lse_pass,
    mass_pass,
)
from pallas_kernels.estimate.xla import num_bands_of
from pallas_kernels.hopper import tile_transforms
from pallas_kernels.lowering_cache import lowered_once
from pallas_kernels.notation import INITIAL_ROW_MAX, Array, Float, Int32, Ref

RESIDENT_BYTES = 2**16
"""Keys that a thread block keeps in shared memory, at most: two thread blocks share the 227 KiB of a multiprocessor."""

SCRATCH_BYTES = 2**13
"""Shared memory through which warps add up their sums over queries: Mosaic GPU takes it from the same 227 KiB."""

NUM_PROGRAMS = 2 * NUM_MULTIPROCESSORS
"""Thread blocks of a launch, at least, where the prompt is long enough: two for each multiprocessor."""

MIN_SCALE = 1e-6
"""Below about 1e-8 a hidden key's `MASKED_SCORE`, scaled, would not be below `INITIAL_ROW_MAX`, and would count."""


def column_mass(
    k: Float[Array, "s g d"],
    kv_pos: Int32[Array, "n s"],
    kv_head: Int32[Array, " h"],
    q: Float[Array, "h q d"],
    q_pos: Int32[Array, "h q"],
    *,
    scale: float,
) -> tuple[Float[Array, "h s"]]:
    """Attention mass per key, see `api.column_mass`.

    Raises:
      NotImplementedError: no Hopper GPU is the default device, or `check_supported` refuses.
    """
    check_hopper_gpu()
    check_supported(q, k, scale)
    return lowered_once(launch, k, kv_pos, kv_head, q, q_pos, scale=scale)


def line_mass(
    k: Float[Array, "s g d"],
    kv_pos: Int32[Array, "n s"],
    kv_head: Int32[Array, " h"],
    q: Float[Array, "h q d"],
    q_pos: Int32[Array, "h q"],
    q_row: Int32[Array, "h q"],
    *,
    scale: float,
    band: int,
) -> tuple[Float[Array, "h s"], Float[Array, "h bands"]]:
    """Attention mass per key and per band of diagonals, see `api.line_mass`.

    Raises:
      NotImplementedError: as from `column_mass`.
    """
    check_hopper_gpu()
    check_supported(q, k, scale, band)
    return lowered_once(launch, k, kv_pos, kv_head, q, q_pos, q_row, scale=scale, band=band)


def check_supported(q: Float[Array, "h q d"], k: Float[Array, "s g d"], scale: float, band: int = 16) -> None:
    """Raises NotImplementedError, with limit and value, for what the kernel cannot take."""
    limits = [
        (
            q.dtype == k.dtype and q.dtype in (jnp.bfloat16, jnp.float16),
            f"q and k must be both bfloat16 or both float16, got {q.dtype}, {k.dtype}",
        ),
        # Whole swizzled rows of 64 numbers.
        (q.shape[2] in (64, 128, 256), f"head_dim must be 64, 128 or 256, got {q.shape[2]}"),
        (q.shape[1] <= NUM_QUERIES, f"a head may have at most {NUM_QUERIES} queries, got {q.shape[1]}"),
        (k.shape[0] % MIN_TILE == 0, f"keys must be a multiple of {MIN_TILE}, got {k.shape[0]}"),
        (scale >= MIN_SCALE, f"scale must be at least {MIN_SCALE}, got {scale}"),
        # An accumulator is cut at multiples of 8 columns, the smallest N of wgmma; and bands must divide a tile of 64.
        (band in (8, 16, 32, 64), f"a band must be 8, 16, 32 or 64 keys, got {band}"),
    ]
    for holds, message in limits:
        if not holds:
            raise NotImplementedError(f"mosaic_gpu: {message}")


def launch(
    k: Float[Array, "s g d"],
    kv_pos: Int32[Array, "n s"],
    kv_head: Int32[Array, " h"],
    q: Float[Array, "h q d"],
    q_pos: Int32[Array, "h q"],
    q_row: Int32[Array, "h q"] | None = None,
    *,
    scale: float,
    band: int = 0,
    num_programs: int = NUM_PROGRAMS,
) -> tuple[Float[Array, "h _"], ...]:
    """The masses per key, and per band where `q_row` and `band` are given, by two passes."""
    missing = NUM_QUERIES - q.shape[1]
    # Up to 64 rows, wgmma's M; those that are not there have position -1 and see no key.
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0)))
    q_pos = jnp.pad(q_pos, ((0, 0), (0, missing)), constant_values=-1)
    num_heads, (num_keys, num_kv_heads, _) = q.shape[0], k.shape
    shape = EstimateShape(
        num_kv_heads=num_kv_heads,
        num_keys=keys_per_split(k, num_programs),
        kv_heads_per_row=num_kv_heads // kv_pos.shape[0],
        score_scale=scale * math.log2(math.e),
        band=band,
    )
    num_splits = num_keys // shape.num_keys
    arrays = {
        "q": q,
        "k": k,
        "heads": jnp.argsort(kv_head),
        "first_head": jnp.sum(kv_head[None] < jnp.arange(num_kv_heads + 1)[:, None], axis=1, dtype=jnp.int32),
        "q_pos": q_pos,
        "kv_pos": kv_pos,
        "min_q_pos": jnp.min(q_pos, axis=1),
        "max_kv_pos": jnp.max(kv_pos.reshape(kv_pos.shape[0], num_splits, -1), axis=2),
    }
    partial = jax.ShapeDtypeStruct((num_heads, num_splits, NUM_QUERIES), jnp.float32)
    # The splits of a head are merged between two launches: thread blocks of one launch do not wait for each other.
    row_max, row_sum = _launch(lse_pass, arrays, (), shape, num_splits, (partial, partial))
    highest = jnp.max(row_max, axis=1)
    lse = highest + jnp.log2(jnp.sum(row_sum * jnp.exp2(row_max - highest[:, None]), axis=1))
    lse = jnp.maximum(lse, INITIAL_ROW_MAX)  # of a query that sees nothing; weights of hidden keys stay 0
    per_key = jax.ShapeDtypeStruct((num_heads, num_keys), jnp.float32)
    if q_row is None:
        return tuple(_launch(mass_pass, arrays, (lse,), shape, num_splits, (per_key,)))
    q_row = jnp.pad(q_row, ((0, 0), (0, missing)), constant_values=-1)
    past_start = jnp.maximum(q_row, 0) + band // 2  # of the band of distance 0, in keys from the first
    per_band = jax.ShapeDtypeStruct((num_heads, num_keys // shape.tile, shape.bands_per_tile, NUM_QUERIES), jnp.float32)
    mass, tile_mass = _launch(line_pass, arrays, (lse, past_start % band), shape, num_splits, (per_key, per_band))
    nearest = jnp.where(q_row >= 0, past_start // band, -1)
    return mass, jax.vmap(_by_distance, (0, 0, None))(tile_mass, nearest, num_bands_of(num_keys, band))


def keys_per_split(k: Array | jax.ShapeDtypeStruct, num_programs: int) -> int:
    """Keys of a thread block's split: a power of two that divides all, few enough for `num_programs` of them."""
    num_keys, num_kv_heads, head_dim = k.shape
    # Powers of two, so that a split is whole tiles and rows of keys start at multiples of them.
    limit = min(RESIDENT_BYTES // (head_dim * 2), max(MIN_TILE, num_keys * num_kv_heads // num_programs))
    return math.gcd(num_keys, 2 ** (limit.bit_length() - 1))


def _by_distance(
    tile_mass: Float[Array, "tiles n q"], nearest: Int32[Array, " q"], num_bands: int
) -> Float[Array, " bands"]:
    """Mass per band of distance [num_bands] of one head, from that of every tile's bands.

    Args:
      nearest: the band of distance 0 of each query, counted from the first key on as the bands of all tiles are; -1 for
        a query that is not there.
    """
    num_tiles, per_tile = tile_mass.shape[0], tile_mass.shape[1] - 1  # a tile's last band is the next one's first
    query = jnp.arange(NUM_QUERIES)

    def rows(tile: Array, band: Array | int, is_there: Array | bool) -> Array:
        is_there &= (tile >= 0) & (tile < num_tiles)
        return jnp.where(is_there, tile_mass[jnp.clip(tile, 0, num_tiles - 1), band, query[None]], 0.0)

    at = nearest[None] - jnp.arange(num_bands)[:, None]
    tile, band = at >> (per_tile.bit_length() - 1), at & (per_tile - 1)  # XLA computes a division apart, and stores it
    return jnp.sum(rows(tile, band, True) + rows(tile - 1, per_tile, band == 0), axis=1)


def _launch(
    body: Callable[..., None],
    arrays: Mapping[str, Array],
    more: tuple[Array, ...],
    shape: EstimateShape,
    num_splits: int,
    out_type: tuple[jax.ShapeDtypeStruct, ...],
) -> Sequence[Array]:
    """The outputs of a pass: `body(refs, *refs_of_more, *refs_of_outputs, shape)` on every split of every kv head."""
    q = arrays["q"]
    transforms = tile_transforms()
    scratch: dict[str, Ref] = {
        # Two buffers of queries, the next head's arriving while one is multiplied; the keys stay for all heads.
        "q_tiles": plgpu.SMEM((2, NUM_QUERIES, q.shape[2]), q.dtype, transforms=transforms),
        "k_tiles": plgpu.SMEM((shape.num_keys, q.shape[2]), q.dtype, transforms=transforms),
        "q_ready": plgpu.Barrier(num_barriers=2),
        "k_ready": plgpu.Barrier(),
    }

    def attention_mass(*refs: Ref, **scratch: Ref) -> None:
        inputs = Refs(**dict(zip(arrays, refs, strict=False)), **scratch)
        body(inputs, *refs[len(arrays) :], shape)

    run = plgpu.kernel(
        attention_mass,
        out_type=out_type,
        scratch_types=scratch,
        grid=(shape.num_kv_heads * num_splits,),
        grid_names=("program",),
        # Sums over the queries of `line_pass` cross warps, through shared memory; all else stays within a warp.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=SCRATCH_BYTES),
    )
    return run(*arrays.values(), *more)
