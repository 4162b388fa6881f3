"""Block-sparse attention on TPUs: checks, padding, layouts and the launch of the Mosaic TPU kernel."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.inputs import AttentionInputs, zero_padding
from pallas_kernels.attention.tpu.mosaic_tpu_kernel import attention_kernel
from pallas_kernels.attention.tpu.mosaic_tpu_loads import KernelShape, Refs
from pallas_kernels.attention.tpu.tpu_config import (
    LANES,
    MAX_INTERVALS,
    PIECE_ENTRIES,
    ROW_FIELDS,
    START_TOKENS,
    TpuConfig,
)
from pallas_kernels.block_index import BlockIndex
from pallas_kernels.device import tpu_kind
from pallas_kernels.notation import PAD_KV_POS, Array, Float, Int32, Ref


def attend(inputs: AttentionInputs) -> tuple[Float[Array, "h t d"], Float[Array, "h t"]]:
    """Attention output in the query's dtype and log-sum-exp in float32; a query that attends nothing: zeros, -inf.

    Raises:
      NotImplementedError: the default backend is no TPU, or `check_supported` refuses.
    """
    return launch(inputs, choose_config(inputs, tpu_kind()))


def choose_config(inputs: AttentionInputs, device_kind: str = "") -> TpuConfig:
    """Tiles of 1024 keys, or of one block where blocks are larger, and the steps that schedule best on this chip.

    Args:
      inputs: the arguments; their `block_kv` alone is looked at.
      device_kind: as a TPU device names its kind, "TPU v5 lite"; an unknown one gets the other chips' steps.
    """
    tile_kv = max(1024, inputs.index.block_kv)
    # Bundles of a masked tile in steps of 256 and 512 keys: v5e 2,324 and 2,120, v6e 1,366 and 1,620, v4 2,334 and
    # 2,964 (compiler's schedule, docs/log.md of 2026-11-25). Without masks one step for the whole tile is best.
    masked_kv = 512 if device_kind.startswith("TPU v5") else 256
    return TpuConfig(tile_kv=tile_kv, compute_kv=tile_kv, masked_kv=masked_kv)


def check_supported(inputs: AttentionInputs, config: TpuConfig) -> None:
    """Raises NotImplementedError, with limit and value, for what the kernel cannot take."""
    index, (_, s, d), x = inputs.index, inputs.k.shape, inputs.k_extra.shape[1]
    dtype = inputs.q.dtype
    limits = [
        (dtype in (jnp.bfloat16, jnp.float32), f"q must be bfloat16 or float32, got {dtype}"),
        (d <= 256, f"head_dim must be at most 256, got {d}"),
        # Query and key positions are rows along lanes, and slices along lanes start at multiples of 128.
        (index.block_q % LANES == 0, f"block_q must be a multiple of {LANES}, got {index.block_q}"),
        (index.block_kv % LANES == 0, f"block_kv must be a multiple of {LANES}, got {index.block_kv}"),
        (config.tile_kv % index.block_kv == 0, f"block_kv must divide {config.tile_kv=}, got {index.block_kv}"),
        (
            # A DMA moves whole register tiles: 16 rows of bfloat16.
            s % START_TOKENS == 0 and x % START_TOKENS == 0,
            f"shared and extra kv rows must be multiples of {START_TOKENS}, got {s} and {x}",
        ),
        (
            index.intervals.shape[1] <= MAX_INTERVALS,
            f"a head may have at most {MAX_INTERVALS} intervals, got {index.intervals.shape[1]}",
        ),
        (inputs.scale > 0, f"scale must be positive, got {inputs.scale}"),
    ]
    for holds, message in limits:
        if not holds:
            raise NotImplementedError(f"mosaic_tpu: {message}")
    vmem_bytes = config.vmem_bytes(block_q=index.block_q, block_kv=index.block_kv, dtype=dtype, **widths(d))
    if vmem_bytes > config.vmem_limit_bytes:
        raise NotImplementedError(f"mosaic_tpu: {config} at {index.block_q=} and head_dim {d} needs {vmem_bytes} bytes")


def widths(head_dim: int) -> dict[str, int]:
    """Lanes of a q row, a gathered kv row and an accumulator row.

    Up to 64, values and keys of a token share 128 lanes, and q has zeros where the values are; beyond, they are apart.
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
    entries, kv_pos = entry_values(inputs), position_rows(inputs.kv_pos, index.block_kv)
    rows = row_fields(index, entries)
    shape = _kernel_shape(inputs, config, size)
    arrays = dict(
        row=rows,
        next_row=rows,
        intervals=interval_bounds(index),
        q=_place(inputs.q, begin=out_width if is_packed else 0, width=width),
        q_pos=inputs.q_pos.reshape(num_heads * num_q_blocks, 1, block_q),
        # In HBM, and no scalar-prefetch argument: that would be in SMEM, where the lists of a long prompt do not fit.
        entries=flat_lists(entries),
        kv=gathered_rows(inputs, out_width),
        kv_pos=kv_pos,
    )
    scratch = config.scratch(
        block_q=block_q, block_kv=index.block_kv, width=width, kv_width=size["kv_width"], dtype=dtype
    )
    names = (*arrays, "out", "lse", *scratch)

    def block_sparse_attention(*refs: Ref) -> None:
        attention_kernel(Refs(**dict(zip(names, refs, strict=True))), shape)

    flat = lambda h, i: (h * num_q_blocks + i, 0, 0)  # noqa: E731
    # The last two axes of a block must be the array's or whole tiles of (8, 128): so rows are [rows, 1, 8], and a block
    # of them [1, 1, 8].
    row_block = functools.partial(pl.BlockSpec, (1, 1, ROW_FIELDS), memory_space=pltpu.SMEM)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    run = pl.pallas_call(
        block_sparse_attention,
        grid=(num_heads, num_q_blocks),
        in_specs=[
            row_block(flat),
            # The same array again, one q block ahead: its loads start before its turn.
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
            # Heads are independent, for chips with two cores; the q blocks of one are not: each starts the next one's
            # loads, and scratch carries which buffer they go to.
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=config.vmem_limit_bytes,
            # Starts are brought into range by `entry_values`; a check would be scalar work at every DMA.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="block_sparse_attention",
    )
    out, lse = run(*arrays.values())
    return out[..., :head_dim], lse.reshape(num_heads, t)


def _kernel_shape(inputs: AttentionInputs, config: TpuConfig, size: dict[str, int]) -> KernelShape:
    index, width, parts = inputs.index, size["width"], tuple(range(size["kv_width"] // LANES))
    return KernelShape(
        config=config,
        block_kv=index.block_kv,
        num_q_blocks=index.num_q_blocks,
        heads_per_kv_head=inputs.heads_per_kv_head,
        num_shared=inputs.k.shape[1],
        num_extra=inputs.k_extra.shape[1],
        list_entries=-(-index.start.shape[1] // LANES) * LANES,
        pos_rows=-(-inputs.kv_pos.shape[1] // LANES),
        v_parts=parts[: width // LANES],
        k_parts=parts[-width // LANES :],
        score_scale=inputs.scale * math.log2(math.e),
    )


def entry_values(inputs: AttentionInputs) -> Int32[Array, "h l"]:
    """Each entry as a row of what is gathered, a multiple of 16, plus the number of its interval.

    A head's gathered rows lie behind the shared ones and those of the heads before it (see `gathered_rows`). An entry
    of no row may hold anything and be copied all the same: it is brought into range.
    """
    index, (num_heads, num_extra, _) = inputs.index, inputs.k_extra.shape
    gathered_offset = (jnp.arange(num_heads, dtype=jnp.int32) % inputs.heads_per_kv_head * num_extra)[:, None]
    start = jnp.clip(index.start, 0, inputs.kv_pos.shape[1] - index.block_kv)
    interval = jnp.clip(index.interval, 0, index.intervals.shape[1] - 1)
    return start + interval + jnp.where(start >= inputs.k.shape[1], gathered_offset, 0)


def row_fields(index: BlockIndex, entries: Int32[Array, "h l"]) -> Int32[Array, "rows 1 8"]:
    """One row per q block: where its list begins, its full entries, all entries, its row of key positions, its last."""
    end = entries.shape[1] - 1
    first, last = (jnp.clip(entry, 0, end) for entry in (index.first, index.first + index.count - 1))
    last_entry = jnp.take_along_axis(entries, last, axis=1)
    fields = jnp.stack([first, index.num_full, index.count, index.pos_row, last_entry], axis=-1)
    fields = jnp.pad(fields, ((0, 0), (0, 0), (0, ROW_FIELDS - fields.shape[-1])))
    return fields.reshape(-1, 1, ROW_FIELDS)


def flat_lists(entries: Int32[Array, "h l"]) -> Int32[Array, "1 entries"]:
    """The heads' lists one after another, each padded to 128 entries, and entries that a last copy may run into."""
    entries = jnp.pad(entries, ((0, 0), (0, -entries.shape[1] % LANES))).reshape(-1)
    # A copy is always of 512 entries, from a multiple of 128: it may run past the end of the last list.
    return jnp.pad(entries, (0, PIECE_ENTRIES))[None]


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


def gathered_rows(inputs: AttentionInputs, begin_of_keys: int) -> Float[Array, "g groups parts 16 lanes"]:
    """Values and keys of a token together, so that one DMA brings both: shared rows, then those gathered for each head.

    In groups of 16 tokens, within a group by 128 lanes: what a DMA moves is one piece of memory, which takes the scalar
    unit fewer instructions than a strided copy. Values that no query may look at, which may be NaN, are zeros: a weight
    of 0 times NaN is NaN.
    """
    num_kv_heads = inputs.k.shape[0]
    v, v_extra = zero_padding(inputs)

    def side_by_side(v: Array, k: Array) -> Array:
        return jnp.concatenate([_place(v, begin=0, width=begin_of_keys), _place(k, begin=0, width=begin_of_keys)], -1)

    shared = side_by_side(v, inputs.k)
    gathered = side_by_side(v_extra, inputs.k_extra).reshape(num_kv_heads, -1, 2 * begin_of_keys)
    rows = jnp.concatenate([shared, gathered], axis=1)
    # A strided descriptor's 9 words take a bundle each: without it 8 DMAs on 7x are about 77 bundles, with it 142
    # (docs/log.md of 2026-11-25).
    grouped = rows.reshape(num_kv_heads, -1, START_TOKENS, 2 * begin_of_keys // LANES, LANES)
    return grouped.transpose(0, 1, 3, 2, 4)


def _place(x: Array, *, begin: int, width: int) -> Array:
    """`x` in rows of `width` lanes, from lane `begin`, zeros around it."""
    return jnp.pad(x, ((0, 0), (0, 0), (begin, width - begin - x.shape[2])))
