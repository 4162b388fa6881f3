"""Block-sparse attention on Hopper GPUs: checks, padding, the work table and the launch of the Mosaic GPU kernel."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.hopper.gpu_config import (
    COMPUTE_WARPGROUPS,
    TILE_Q,
    HopperConfig,
    padded_head_dim,
)
from pallas_kernels.attention.hopper.gpu_tuned import choose_config
from pallas_kernels.attention.hopper.kernel_refs import HEAD, Q_START, KernelShape, Refs
from pallas_kernels.attention.hopper.mosaic_gpu_kernel import attention_kernel
from pallas_kernels.attention.hopper.tile_scheduler import assign_round_robin, assign_rows, work_table
from pallas_kernels.attention.inputs import AttentionInputs, zero_padding
from pallas_kernels.device import NUM_MULTIPROCESSORS, check_hopper_gpu
from pallas_kernels.hopper import SHARED_MEMORY_BYTES
from pallas_kernels.lowering_cache import lowered_once
from pallas_kernels.notation import PAD_KV_POS, Array, Float, Int32, Ref


def attend(inputs: AttentionInputs) -> tuple[Float[Array, "h t d"], Float[Array, "h t"]]:
    """Attention output in the query's dtype and log-sum-exp in float32; a query that attends nothing: zeros, -inf.

    Raises:
      NotImplementedError: no Hopper GPU is the default device, or `check_supported` refuses.
    """
    check_hopper_gpu()
    check_supported(inputs)
    head_dim = padded_head_dim(inputs.q.shape[-1])
    config = choose_config(head_dim, inputs.index.block_kv, inputs.heads_per_kv_head)
    return lowered_once(launch, _rounded(inputs), config=config)


def _rounded(inputs: AttentionInputs) -> AttentionInputs:
    """The same inputs with lists, gathered rows and rows of positions padded to a few lengths, so that layers whose
    plans differ in size launch the same kernel: a kernel is lowered and compiled in seconds.
    """
    index, extra = inputs.index, inputs.k_extra.shape[1]
    more_extra = 4 ** -(-(extra - 1).bit_length() // 2) - extra if extra else 0  # a power of four: they are few
    num_entries = index.start.shape[1]
    more_entries = -num_entries % max(1, 2 ** (num_entries.bit_length() - 4))  # an eighth at most
    more_rows = -inputs.kv_pos.shape[0] % 16
    entries, rows = ((0, 0), (0, more_entries)), ((0, 0), (0, more_extra), (0, 0))
    return dataclasses.replace(
        inputs,
        k_extra=jnp.pad(inputs.k_extra, rows),
        v_extra=jnp.pad(inputs.v_extra, rows),
        kv_pos=jnp.pad(inputs.kv_pos, ((0, more_rows), (0, more_extra)), constant_values=PAD_KV_POS),
        index=dataclasses.replace(
            index,
            start=jnp.pad(index.start, entries),
            interval=jnp.pad(index.interval, entries),
            intervals=jnp.pad(index.intervals, ((0, 0), (0, -index.intervals.shape[1] % 8), (0, 0))),
        ),
    )


def check_supported(inputs: AttentionInputs) -> None:
    """Raises NotImplementedError, with limit and value, for what the kernel cannot take."""
    index, d = inputs.index, inputs.q.shape[-1]
    limits = [
        (inputs.q.dtype in (jnp.bfloat16, jnp.float16), f"q must be bfloat16 or float16, got {inputs.q.dtype}"),
        # A d of 256 is N = 256 of PV, the widest wgmma (PTX ISA), and 128 accumulator registers of 240.
        (d <= 256, f"head_dim must be at most 256, got {d}"),
        (index.block_q % TILE_Q == 0, f"block_q must be a multiple of {TILE_Q}, got {index.block_q}"),
        (index.block_kv % 64 == 0, f"block_kv must be a multiple of 64, got {index.block_kv}"),
        (inputs.scale > 0, f"scale must be positive, got {inputs.scale}"),
        # A copy takes `tile_kv` rows, up to 128, of an array that must have as many.
        (inputs.k.shape[1] >= 128, f"the shared kv view must have at least 128 rows, got {inputs.k.shape[1]}"),
        (
            inputs.k_extra.shape[1] == 0 or inputs.k_extra.shape[1] >= 128,
            f"extra rows must be none or at least 128, got {inputs.k_extra.shape[1]}",
        ),
    ]
    for holds, message in limits:
        if not holds:
            raise NotImplementedError(f"mosaic_gpu: {message}")


def launch(
    inputs: AttentionInputs,
    config: HopperConfig,
    *,
    num_programs: int = NUM_MULTIPROCESSORS,
    interpretable: bool = False,
) -> tuple[Float[Array, "h t d"], Float[Array, "h t"]]:
    """Runs the kernel with this config; `interpretable` runs the body's twin for GPU interpret mode."""
    index, dtype, head_dim = inputs.index, inputs.q.dtype, inputs.q.shape[-1]
    d = padded_head_dim(head_dim)
    smem_bytes = config.shared_memory_bytes(d, dtype)
    if smem_bytes > SHARED_MEMORY_BYTES:
        raise NotImplementedError(f"{config} needs {smem_bytes} bytes of shared memory of {SHARED_MEMORY_BYTES}")
    table = work_table(index, config.lengths_per_octave)
    assignment = assign_rows(table, num_programs)
    shape = KernelShape(
        config=config,
        num_programs=num_programs,
        num_rows=table.shape[0] - 1,
        tiles_per_block=index.block_kv // config.tile_kv,
        num_entries=index.start.shape[1],
        num_intervals=index.intervals.shape[1],
        heads_per_kv_head=inputs.heads_per_kv_head,
        num_shared=inputs.k.shape[1],
        has_extra=inputs.k_extra.shape[1] > 0,
        # Exponentials are of base 2, and their factor goes into the scale (see mosaic_gpu_softmax.py).
        score_scale=inputs.scale * math.log2(math.e),
        fixed_max=config.fixed_max and dtype == jnp.bfloat16,  # float16 ends at 2**16
        interpretable=interpretable,
    )
    arrays = _arrays(inputs, d)
    out, lse = _run(table, assignment, arrays, shape)
    if shape.fixed_max:
        # A launch and no branch: which rows are repeated is known on the device alone. Nearly always there are none,
        # which costs about 0.02 ms (H100, docs/log.md of 2026-11-25).
        again, assignment = _rows_to_repeat(table, lse), assign_round_robin(shape.num_rows, num_programs)
        out, lse = _run(again, assignment, arrays, dataclasses.replace(shape, fixed_max=False), (out, lse))
    return out[..., :head_dim], lse


def _arrays(inputs: AttentionInputs, padded_dim: int) -> dict[str, Array]:
    """The arrays that the kernel reads, except the work table, by the names of `Refs`."""
    index = inputs.index
    v, v_extra = (inputs.v, inputs.v_extra) if inputs.has_zeroed_padding else zero_padding(inputs)

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, padded_dim - x.shape[2])))

    arrays: dict[str, Any] = dict(start=index.start, interval=index.interval, intervals=index.intervals)
    arrays |= dict(q=pad(inputs.q), k=pad(inputs.k), v=pad(v))
    if inputs.k_extra.shape[1]:
        arrays |= dict(k_extra=pad(inputs.k_extra), v_extra=pad(v_extra))
    return arrays | dict(q_pos=inputs.q_pos, kv_pos=inputs.kv_pos)


def _run(
    table: Int32[Array, "rows 32"],
    assignment: Int32[Array, " bounds"],
    arrays: dict[str, Array],
    shape: KernelShape,
    previous: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """One launch over the q tiles of the table: output and log-sum-exp, written over `previous` where it is given."""
    arrays = dict(table=table, assignment=assignment) | arrays
    q = arrays["q"]
    buffers, barriers = shape.config.buffers(q.shape[-1], q.dtype), shape.config.barriers()

    def block_sparse_attention(*refs: Ref) -> None:
        names = (*arrays, "out", "lse")
        given: dict[str, Ref] = dict(k_extra=None, v_extra=None) | dict(zip(names, refs, strict=False))
        smem = dict(zip(buffers, refs[len(names) :], strict=False))
        barrier_refs = dict(zip(barriers, refs[len(names) + len(buffers) :], strict=True))
        attention_kernel(Refs(smem=smem, barriers=barrier_refs, **given), shape)

    fresh = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:2], jnp.float32))
    run = plgpu.kernel(
        block_sparse_attention,
        out_type=fresh if previous is None else (),
        scratch_types=(*buffers.values(), *barriers.values()),
        # Persistent: one thread block a multiprocessor, whose registers and shared memory leave no room for a second.
        grid=(shape.num_programs,),
        grid_names=("program",),
        # A thread of Mosaic GPU is a warpgroup, 128 threads of CUDA: what issues a wgmma.
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        # Approximate: exp2 is ex2.approx, one instruction of the multi-function unit. No scratch: a row of an
        # accumulator lies in four threads of one warp, so that sums and maxima along it are shuffles.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    if previous is None:
        return run(*arrays.values())
    # Written in place: q tiles that are not in the table keep what the first launch wrote.
    refs = tuple(map(jax.new_ref, previous))
    run(*arrays.values(), *refs)
    out, lse = map(jax.freeze, refs)
    return out, lse


def _rows_to_repeat(table: Int32[Array, "rows 32"], lse: Float[Array, "h t"]) -> Int32[Array, "rows 32"]:
    """The table's rows whose q tile holds a log-sum-exp of +inf, then rows that end the table."""
    is_failed = jnp.any(jnp.isposinf(lse).reshape(lse.shape[0], -1, TILE_Q), axis=2)
    is_row = is_failed[table[:-1, HEAD], table[:-1, Q_START] // TILE_Q]
    # Compacted by a running count and one scatter, in the table's order, longest first, in place of a sort.
    place = jnp.where(is_row, jnp.cumsum(is_row) - 1, len(table))
    ends = jnp.broadcast_to(table[-1], table.shape)
    return ends.at[place].set(table[:-1], mode="drop")
