"""decode_attention on Hopper GPUs: checks, packing of the heads, the launch, and the merge of the splits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode.inputs import DecodeInputs
from pallas_kernels.decode.mosaic_gpu_kernel import TILE_KEYS, TILE_ROWS, DecodeShape, Refs, decode_kernel
from pallas_kernels.device import NUM_MULTIPROCESSORS, check_hopper_gpu
from pallas_kernels.hopper import tile_transforms
from pallas_kernels.notation import Array, Float, Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the keys of a prompt are split.

    Args:
      num_stages: tiles of keys and values that a thread block holds, one of which is computed on.
      blocks_per_multiprocessor: thread blocks of the launch for each multiprocessor.
    """

    num_stages: int
    blocks_per_multiprocessor: int


CONFIGS = {
    64: DecodeConfig(num_stages=4, blocks_per_multiprocessor=2),
    128: DecodeConfig(num_stages=4, blocks_per_multiprocessor=1),
    256: DecodeConfig(num_stages=3, blocks_per_multiprocessor=1),
}
"""By head dim: as many bytes in flight as the 227 KiB of shared memory hold, 32 KB a stage at a head dim of 128."""


def attend(inputs: DecodeInputs) -> Float[Array, "b h d"]:
    """See `api.decode_attention`.

    Raises:
      NotImplementedError: no Hopper GPU is the default device, or `check_supported` refuses.
    """
    check_hopper_gpu()
    check_supported(inputs)
    return launch(inputs, CONFIGS[inputs.q.shape[-1]])


def check_supported(inputs: DecodeInputs) -> None:
    """Raises NotImplementedError, with limit and value, for what the kernel cannot take."""
    q, k, k_new = inputs.q, inputs.k, inputs.k_new
    limits = [
        (
            q.dtype == k.dtype and q.dtype in (jnp.bfloat16, jnp.float16),
            f"q, k and v must be all bfloat16 or all float16, got {q.dtype}, {k.dtype}",
        ),
        (q.shape[-1] in CONFIGS, f"head_dim must be one of {tuple(CONFIGS)}, got {q.shape[-1]}"),
        (
            inputs.heads_per_kv_head <= TILE_ROWS,
            f"at most {TILE_ROWS} query heads may read a kv head, got {inputs.heads_per_kv_head}",
        ),
        (
            k.shape[2] % TILE_KEYS == 0 and k_new.shape[2] % TILE_KEYS == 0,
            f"room for tokens must be a multiple of {TILE_KEYS}, got {k.shape[2]} and {k_new.shape[2]}",
        ),
        (
            # TMA's coordinates are 32-bit integers (PTX ISA, "cp.async.bulk.tensor").
            math.prod(k.shape[:3]) < 2**31 and math.prod(k_new.shape[:3]) < 2**31,
            f"rows of the cache must count below 2**31, got {k.shape[:3]} and {k_new.shape[:3]}",
        ),
        (inputs.scale > 0, f"scale must be positive, got {inputs.scale}"),
    ]
    for holds, message in limits:
        if not holds:
            raise NotImplementedError(f"mosaic_gpu: {message}")


def launch(
    inputs: DecodeInputs, config: DecodeConfig, *, num_splits: int | None = None, interpretable: bool = False
) -> Float[Array, "b h d"]:
    """Runs the kernel and merges its splits; `interpretable` runs the body's twin for GPU interpret mode.

    Args:
      num_splits: thread blocks for each kv head of each prompt; as many as `config` puts on the chip when None.
    """
    b, h, d = inputs.q.shape
    num_kv_heads, ratio = inputs.k.shape[3], inputs.heads_per_kv_head
    if num_splits is None:
        # One wave: thread blocks that all run at once, so that none waits for a second round.
        num_splits = max(1, config.blocks_per_multiprocessor * NUM_MULTIPROCESSORS // (b * num_kv_heads))
    shape = DecodeShape(
        batch=b,
        num_kv_heads=num_kv_heads,
        num_splits=num_splits,
        num_stages=config.num_stages,
        num_rows=-(-ratio // 8) * 8,
        capacity=inputs.k.shape[2],
        new_capacity=inputs.k_new.shape[2],
        score_scale=inputs.scale * math.log2(math.e),
        interpretable=interpretable,
    )
    q = inputs.q.reshape(b * num_kv_heads, ratio, d)
    arrays = dict(
        counts=jnp.concatenate([jnp.stack([inputs.layer, inputs.num_new]), inputs.lengths]),
        q=jnp.pad(q, ((0, 0), (0, TILE_ROWS - ratio), (0, 0))),
    )
    # Layers, prompts and rows become one axis: TMA knows five (cuTensorMapEncodeTiled), and tiling adds two to these
    # three. The layer is then an offset, and no cache is sliced or copied.
    caches = dict(k=inputs.k, v=inputs.v, k_new=inputs.k_new, v_new=inputs.v_new)
    out, lse = _run(arrays | {name: x.reshape(-1, *x.shape[3:]) for name, x in caches.items()}, shape)
    # Splits that hold no key have a log-sum-exp far below any other, and so a weight of 0.
    weights = jax.nn.softmax(lse[..., :ratio] * math.log(2.0), axis=1)
    merged = jnp.sum(out[:, :, :ratio].astype(jnp.float32) * weights[..., None], axis=1)
    return merged.astype(inputs.q.dtype).reshape(b, h, d)


def _run(arrays: dict[str, Array], shape: DecodeShape) -> tuple[Array, Array]:
    """The splits' outputs `[b * g, splits, rows, d]` and base-2 log-sum-exps `[b * g, splits, 64]`."""
    q = arrays["q"]
    num_heads, d = q.shape[0], q.shape[-1]
    transforms = tile_transforms()
    scratch: dict[str, Ref] = dict(
        q_tile=plgpu.SMEM((TILE_ROWS, d), q.dtype, transforms=transforms),
        k_tiles=plgpu.SMEM((shape.num_stages, TILE_KEYS, d), q.dtype, transforms=transforms),
        v_tiles=plgpu.SMEM((shape.num_stages, TILE_KEYS, d), q.dtype, transforms=transforms),
        q_ready=plgpu.Barrier(),
        # Two arrivals: K and V of a tile are two copies.
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=shape.num_stages),
    )

    def decode_attention(*refs: Ref) -> None:
        names = (*arrays, "out", "lse", *scratch)
        decode_kernel(Refs(**dict(zip(names, refs, strict=True))), shape)

    run = plgpu.kernel(
        decode_attention,
        out_type=(
            jax.ShapeDtypeStruct((num_heads, shape.num_splits, shape.num_rows, d), q.dtype),
            jax.ShapeDtypeStruct((num_heads, shape.num_splits, TILE_ROWS), jnp.float32),
        ),
        scratch_types=tuple(scratch.values()),
        grid=(num_heads * shape.num_splits,),
        grid_names=("program",),
        # Without scratch: sums and maxima along a row stay in the four threads that hold it.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    return run(*arrays.values())
