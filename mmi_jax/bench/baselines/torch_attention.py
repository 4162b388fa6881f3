"""Peers through torch, where it is installed: cuDNN and FlashAttention-2 dense, FlexAttention on the same lists.

Torch gets the same numbers in its own copies, which it frees after each peer. JAX must leave memory for them on the
device: see `mmi_jax.cli.bench.app`.
"""

import functools
import gc
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np

from mmi_jax.bench.checks.sampled_rows import SampledRows
from mmi_jax.bench.timing.measurements import dense_flops, measurement, rate
from mmi_jax.bench.timing.wall_time import summary, time_calls
from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.block_index import BlockIndex
from pallas_kernels.notation import Array

DENSE = {"cudnn dense, torch": "CUDNN_ATTENTION", "flash-attention-2, torch": "FLASH_ATTENTION"}
"""Names of the dense peers and of their backend in `torch.nn.attention.SDPBackend`."""

FLEX = "flex-attention, torch"
MAX_FLEX_TABLE_BYTES = 2**32
"""FlexAttention's block tables are as wide as a row has blocks; past this they are not built."""


def measure_dense(q, k, v, expected: SampledRows, *, scale: float, repeats: int) -> list[dict[str, Any]]:
    """Figures of each dense peer, checked before it is timed; arguments as for `dense_attention.measure_dense`."""
    return [
        _with_torch(name, lambda torch, b=backend: _sdpa(torch, q, k, v, scale, b, expected, repeats))
        for name, backend in DENSE.items()
    ]


def measure_flex(inputs: AttentionInputs, expected: SampledRows, *, flops: float, repeats: int) -> dict[str, Any]:
    """Figures of FlexAttention over the same lists.

    Args:
      inputs: whose index `flex_tables` takes.
      expected: of `sample`.
      flops: floating-point operations of the visited tiles.
      repeats: measurements.
    """
    return _with_torch(FLEX, lambda torch: _flex(torch, inputs, expected, flops, repeats))


def _with_torch(name: str, measure: Callable[[ModuleType], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds with torch; the memory it took goes back to the device."""

    def with_torch():
        torch = _torch()
        try:
            with torch.no_grad():
                return measure(torch)
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    return measurement(name, with_torch)


def _torch() -> ModuleType:
    """Torch, where it is installed and finds a GPU.

    Raises:
      RuntimeError: it is not, or does not.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes for one kernel
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(f"torch is not installed: {error}") from None
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU")
    return torch


def _sdpa(torch, q, k, v, scale: float, backend: str, expected: SampledRows, repeats: int) -> dict[str, Any]:
    """Dense causal attention through `scaled_dot_product_attention` with one backend and no other."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
    from torch.nn.functional import scaled_dot_product_attention  # pyright: ignore[reportMissingImports]

    tensors = [_tensor(torch, x) for x in (q, k, v)]
    run = functools.partial(scaled_dot_product_attention, is_causal=True, scale=scale)
    with sdpa_kernel([getattr(SDPBackend, backend)]):
        call, note = functools.partial(run, *tensors, enable_gqa=True), {}
        try:
            call()
        except RuntimeError:  # this backend wants as many kv heads as query heads
            repeated = [x.repeat_interleave(q.shape[0] // k.shape[0], dim=1) for x in tensors[1:]]
            call, note = functools.partial(run, tensors[0], *repeated), {"note": "kv heads repeated"}
        return note | _checked_and_timed(torch, call, expected, dense_flops(*q.shape), str(q.dtype), repeats)


def _flex(torch, inputs: AttentionInputs, expected: SampledRows, flops: float, repeats: int) -> dict[str, Any]:
    """FlexAttention, compiled, over the same lists of blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention  # pyright: ignore[reportMissingImports]

    torch.compiler.reset()  # else the ninth shape is not compiled but run eagerly
    counts, tables = flex_tables(jax.tree.map(np.asarray, inputs.index))
    to_device = lambda pair: (torch.from_numpy(x).cuda() for x in pair)  # noqa: E731
    (partial_count, full_count), (partial, full) = to_device(counts), to_device(tables)
    block = inputs.index.block_kv
    mask = BlockMask.from_kv_blocks(
        partial_count, partial, full_count, full, BLOCK_SIZE=block, mask_mod=lambda b, h, q, k: q >= k
    )
    q, k, v = (_tensor(torch, x) for x in (inputs.q, inputs.k, inputs.v))
    call = torch.compile(
        lambda: flex_attention(q, k, v, block_mask=mask, scale=inputs.scale, enable_gqa=True), dynamic=False
    )
    return _checked_and_timed(torch, call, expected, flops, str(inputs.q.dtype), repeats)


def flex_tables(index: BlockIndex) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Counts `[1, h, i]` and left-packed block tables `[1, h, i, i]`, partial then full, int32, on the host.

    Args:
      index: of blocks that all start at multiples of `block_kv`, over as many keys as queries.

    Raises:
      NotImplementedError: the tables would be too large.
    """
    num_heads, num_blocks = index.first.shape
    if (size := 2 * 4 * num_heads * num_blocks**2) > MAX_FLEX_TABLE_BYTES:
        raise NotImplementedError(f"block tables must have at most {MAX_FLEX_TABLE_BYTES} bytes, got {size}")
    partial, full = np.zeros((2, 1, num_heads, num_blocks, num_blocks), np.int32)
    for h, i in np.ndindex(num_heads, num_blocks):
        first, count, num_full = (int(x[h, i]) for x in (index.first, index.count, index.num_full))
        blocks = index.start[h, first : first + count] // index.block_kv
        partial[0, h, i, : count - num_full], full[0, h, i, :num_full] = blocks[num_full:], blocks[:num_full]
    counts = [np.array(x)[None] for x in (index.count - index.num_full, index.num_full)]
    return counts, [partial, full]


def _tensor(torch: ModuleType, x: Array) -> Any:
    """The array as a torch tensor on the device with a leading batch axis; through bytes, as NumPy has no bfloat16."""
    host = torch.from_numpy(np.array(x).view(np.uint8))
    return host.cuda().view(getattr(torch, str(x.dtype)))[None]


def _checked_and_timed(torch, call, expected, flops: float, dtype: str, repeats: int) -> dict[str, Any]:
    """Errors of the output on the sampled rows, then the timing."""
    heads, rows = (torch.from_numpy(x).cuda() for x in (expected.heads, expected.rows))
    out = call()[0, heads, rows].float().cpu().numpy()
    errors = expected.check(out, None, dtype=dtype)
    times = time_calls(call, lambda _: torch.cuda.synchronize(), repeats=repeats)
    return errors | rate(flops, summary(times, compile_ms=0.0)) | {"torch": torch.__version__}
