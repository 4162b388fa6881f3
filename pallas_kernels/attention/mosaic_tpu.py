"""Block-sparse attention on TPUs: checks, padding, layouts and the launch of the Mosaic TPU kernel."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.attention.mosaic_tpu_kernel import KernelShape, Refs, attention_kernel
from pallas_kernels.attention.tpu_config import (
    LANES,
    MAX_INTERVALS,
    PIECE_ROWS,
    ROW_FIELDS,
    START_TOKENS,
    TpuConfig,
)
from pallas_kernels.block_index import BlockIndex
from pallas_kernels.notation import PAD_KV_POS, Array, Float, Int32


def attend(inputs: AttentionInputs) -> tuple[Float[Array, "h t d"], Float[Array, "h t"]]:
    """Attention output in the query's dtype and log-sum-exp in float32; a query that attends nothing: zeros, -inf.

    Raises:
      NotImplementedError: the default backend is no TPU, or `check_supported` refuses.
    """
    if jax.default_backend() != "tpu":
        raise NotImplementedError(f"mosaic_tpu needs a TPU, got {jax.default_backend()=}")
    return launch(inputs, choose_config(inputs))


def choose_config(inputs: AttentionInputs) -> TpuConfig:
    """Tiles of 1024 keys, or of one block where blocks are larger."""
    tile_kv = max(1024, inputs.index.block_kv)
    return TpuConfig(tile_kv=tile_kv, compute_kv=tile_kv)


def check_supported(inputs: AttentionInputs, config: TpuConfig) -> None:
    """Raises NotImplementedError, with limit and value, for what the kernel cannot take."""
    index, (_, s, d), x = inputs.index, inputs.k.shape, inputs.k_extra.shape[1]
    dtype = inputs.q.dtype
    limits = [
        (dtype in (jnp.bfloat16, jnp.float32), f"q must be bfloat16 or float32, got {dtype}"),
        (d <= 256, f"head_dim must be at most 256, got {d}"),
        (index.block_q % LANES == 0, f"block_q must be a multiple of {LANES}, got {index.block_q}"),
        (index.block_kv % LANES == 0, f"block_kv must be a multiple of {LANES}, got {index.block_kv}"),
        (config.tile_kv % index.block_kv == 0, f"block_kv must divide {config.tile_kv=}, got {index.block_kv}"),
        (s % START_TOKENS == 0 and x % START_TOKENS == 0,
         f"shared and extra kv rows must be multiples of {START_TOKENS}, got {s} and {x}"),
        (index.intervals.shape[1] <= MAX_INTERVALS,
         f"a head may have at most {MAX_INTERVALS} intervals, got {index.intervals.shape[1]}"),
        (inputs.scale > 0, f"scale must be positive, got {inputs.scale}"),
    ]  # fmt: skip
    for holds, message in limits:
        if not holds:
            raise NotImplementedError(f"mosaic_tpu: {message}")
    vmem_bytes = config.vmem_bytes(block_q=index.block_q, block_kv=index.block_kv, dtype=dtype, **widths(d))
    if vmem_bytes > config.vmem_limit_bytes:
        raise NotImplementedError(f"mosaic_tpu: {config} at {index.block_q=} and head_dim {d} needs {vmem_bytes} bytes")


def widths(head_dim: int) -> dict[str, int]:
    """Lanes of a q row, a gathered kv row and an accumulator row.

    Up to 64, values and keys of a token share 128 lanes, and q has zeros beside the values; beyond, each has its own.
    """
    width = -(-head_dim // LANES) * LANES
    return dict(q_width=width, kv_width=width if head_dim <= LANES // 2 else 2 * width, width=width)


def launch(
    inputs: AttentionInputs, config: TpuConfig, *, interpret: Any = False
) -> tuple[Float[Array, "h t d"], Float[Array, "h t"]]:
    """Runs the kernel with this config; `interpret` as `pallas_call` takes it."""
    check_supported(inputs, config)
    index, (num_heads, t, head_dim), dtype = inputs.index, inputs.q.shape, inputs.q.dtype
    size = widths(head_dim)
    is_packed = size["kv_width"] == LANES
    width, block_q, num_q_blocks = size["width"], index.block_q, index.num_q_blocks
    out_width = LANES // 2 if is_packed else width
    entries, kv_pos = list_rows(index), position_rows(inputs.kv_pos, index.block_kv)
    shape = KernelShape(
        config=config,
        block_kv=index.block_kv,
        num_q_blocks=num_q_blocks,
        heads_per_kv_head=inputs.heads_per_kv_head,
        num_shared=inputs.k.shape[1],
        num_extra=inputs.k_extra.shape[1],
        list_rows=-(-index.start.shape[1] // LANES),
        pos_rows=-(-inputs.kv_pos.shape[1] // LANES),
        v_lanes=(0, width),
        k_lanes=(0, width) if is_packed else (width, 2 * width),
        score_scale=inputs.scale * math.log2(math.e),
    )
    arrays = dict(
        row=row_fields(index),
        next_row=row_fields(index),
        intervals=interval_bounds(index),
        q=_place(inputs.q, begin=out_width if is_packed else 0, width=width),
        q_pos=inputs.q_pos.reshape(num_heads * num_q_blocks, 1, block_q),
        entries=entries,
        kv=gathered_rows(inputs, out_width),
        kv_pos=kv_pos,
    )
    scratch = config.scratch(
        block_q=block_q, block_kv=index.block_kv, width=width, kv_width=size["kv_width"], dtype=dtype
    )
    names = (*arrays, "out", "lse", *scratch)

    def block_sparse_attention(*refs):
        attention_kernel(Refs(**dict(zip(names, refs, strict=True))), shape)

    flat = lambda h, i: (h * num_q_blocks + i, 0, 0)  # noqa: E731
    row_block = functools.partial(pl.BlockSpec, (1, 1, ROW_FIELDS), memory_space=pltpu.SMEM)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    run = pl.pallas_call(
        block_sparse_attention,
        grid=(num_heads, num_q_blocks),
        in_specs=[
            row_block(flat),
            row_block(lambda h, i: flat(h, jnp.minimum(i + 1, num_q_blocks - 1))),
            pl.BlockSpec((1, 1, 2 * MAX_INTERVALS), lambda h, i: (h, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((1, block_q, width), lambda h, i: (h, i, 0)),
            pl.BlockSpec((1, 1, block_q), flat),
            hbm,
            hbm,
            hbm,
        ],
        out_specs=(
            pl.BlockSpec((1, block_q, out_width), lambda h, i: (h, i, 0)),
            pl.BlockSpec((1, 1, block_q), flat),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((num_heads, t, out_width), dtype),
            jax.ShapeDtypeStruct((num_heads * num_q_blocks, 1, block_q), jnp.float32),
        ),
        scratch_shapes=tuple(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=config.vmem_limit_bytes,
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="block_sparse_attention",
    )
    out, lse = run(*arrays.values())
    return out[..., :head_dim], lse.reshape(num_heads, t)


def row_fields(index: BlockIndex) -> Int32[Array, "rows 1 8"]:
    """One row per q block: where its list begins, its full entries, all entries, and its row of key positions."""
    first = jnp.clip(index.first, 0, index.start.shape[1] - 1)  # an empty row's may be anything
    fields = jnp.stack([first, index.num_full, index.count, index.pos_row], axis=-1)
    fields = jnp.pad(fields, ((0, 0), (0, 0), (0, ROW_FIELDS - fields.shape[-1])))
    return fields.reshape(-1, 1, ROW_FIELDS)


def list_rows(index: BlockIndex) -> Int32[Array, "rows 1 lanes"]:
    """The heads' lists one after another in rows of 128 entries, and rows that a last copy may run into.

    An entry is its start, a multiple of 16, plus the number of its interval.
    """
    entries = index.start + index.interval
    entries = jnp.pad(entries, ((0, 0), (0, -entries.shape[1] % LANES))).reshape(-1, 1, LANES)
    return jnp.pad(entries, ((0, PIECE_ROWS), (0, 0), (0, 0)))


def position_rows(kv_pos: Int32[Array, "n sx"], block_kv: int) -> Int32[Array, "rows 1 lanes"]:
    """Rows of key positions one after another, cut at every 128, and a block's worth that a last copy may run into."""
    rows = jnp.pad(kv_pos, ((0, 0), (0, -kv_pos.shape[1] % LANES)), constant_values=PAD_KV_POS).reshape(-1, 1, LANES)
    return jnp.pad(rows, ((0, block_kv // LANES), (0, 0), (0, 0)), constant_values=PAD_KV_POS)


def interval_bounds(index: BlockIndex) -> Int32[Array, "h 1 32"]:
    """Lower ends of each head's intervals, not below 0, then their widths."""
    low = jnp.maximum(index.intervals[..., 0], 0)
    width = jnp.maximum(index.intervals[..., 1] - low, 0)
    missing = ((0, 0), (0, MAX_INTERVALS - low.shape[1]))
    return jnp.concatenate([jnp.pad(low, missing), jnp.pad(width, missing)], axis=1)[:, None]


def gathered_rows(inputs: AttentionInputs, begin_of_keys: int) -> Float[Array, "g rows lanes"]:
    """Values and keys of a token side by side, so that one DMA brings both: shared rows, then each head's own.

    Values that no query may look at, which may be NaN, are zeros: a weight of 0 does not silence a NaN.
    """
    num_kv_heads, _, d = inputs.k.shape
    v, v_extra = silence_padding(inputs)

    def side_by_side(v, k):
        return jnp.concatenate([_place(v, begin=0, width=begin_of_keys), _place(k, begin=0, width=begin_of_keys)], -1)

    shared = side_by_side(v, inputs.k)
    own = side_by_side(v_extra, inputs.k_extra).reshape(num_kv_heads, -1, 2 * begin_of_keys)
    return jnp.concatenate([shared, own], axis=1)


def silence_padding(inputs: AttentionInputs):
    """`v` and `v_extra` with zeros at the rows that are padding in every row of positions the kv head's queries use."""
    num_kv_heads, s = inputs.k.shape[:2]
    rows = jnp.arange(inputs.kv_pos.shape[0])
    is_used = jnp.any(inputs.index.pos_row[:, :, None] == rows[None, None], axis=1)  # [h, n]
    is_real = inputs.kv_pos != PAD_KV_POS

    def zero(v, is_used, is_real):
        seen = jnp.any(is_used[:, :, None] & is_real[None], axis=1)
        return jnp.where(seen[..., None], v, 0)

    by_kv_head = jnp.any(is_used.reshape(num_kv_heads, -1, len(rows)), axis=1)
    return zero(inputs.v, by_kv_head, is_real[:, :s]), zero(inputs.v_extra, is_used, is_real[:, s:])


def _place(x, *, begin: int, width: int):
    """`x` in rows of `width` lanes, from lane `begin`, zeros around it."""
    return jnp.pad(x, ((0, 0), (0, 0), (begin, width - begin - x.shape[2])))
