"""Peers through torch, where it is installed: cuDNN and FlashAttention-2 dense, FlexAttention on the same lists.

Torch gets the same numbers in copies of its own, which it frees after each peer. JAX must leave room for them on the
device: see `mmi_jax.cli.bench`.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mmi_jax.bench.rows import dense_flops, rate, row
from mmi_jax.bench.sampled import SampledRows, sample, sample_dense
from mmi_jax.bench.timing import summary, time_calls
from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.block_index import BlockIndex

DENSE = {"cudnn dense, torch": "CUDNN_ATTENTION", "flash-attention-2, torch": "FLASH_ATTENTION"}
"""Names of the dense peers and of their backend in `torch.nn.attention.SDPBackend`."""

FLEX = "flex-attention, torch"
MAX_FLEX_TABLE_BYTES = 2**32
"""FlexAttention's block tables are as wide as a row has blocks; past this they are not built."""


def rows(inputs: AttentionInputs, *, flops: float, repeats: int) -> list[dict[str, Any]]:
    """A row for each peer: dense attention on q, k, v, and FlexAttention over the lists; checked before timed."""
    dense = dense_rows(inputs.q, inputs.k, inputs.v, scale=inputs.scale, repeats=repeats)
    return [*dense, row(FLEX, lambda: _flex(inputs, flops, repeats))]


def dense_rows(q, k, v, *, scale: float, repeats: int) -> list[dict[str, Any]]:
    """A row for each dense peer; arguments as for `dense_row`."""
    expected = sample_dense(q, k, v, scale=scale) if _reason_for_no_torch() is None else None
    return [row(name, lambda b=backend: _sdpa(q, k, v, scale, b, expected, repeats)) for name, backend in DENSE.items()]


def _reason_for_no_torch() -> str | None:
    """Why torch cannot be timed here; None when it can."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return f"torch is not installed: {error}"
    return None if torch.cuda.is_available() else "torch finds no GPU"


@contextlib.contextmanager
def _torch() -> Iterator[Any]:
    """Torch, without gradients; its cached memory goes back to the device afterwards."""
    if (refusal := _reason_for_no_torch()) is not None:
        raise RuntimeError(refusal)
    import torch  # pyright: ignore[reportMissingImports]

    try:
        with torch.no_grad():
            yield torch
    finally:
        torch.compiler.reset()  # else the ninth shape is not compiled but run eagerly
        gc.collect()
        torch.cuda.empty_cache()


def _sdpa(q, k, v, scale: float, backend: str, expected: SampledRows | None, repeats: int) -> dict[str, Any]:
    """Dense causal attention through `scaled_dot_product_attention` with one backend and no other."""
    with _torch() as torch:
        from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
        from torch.nn.functional import scaled_dot_product_attention  # pyright: ignore[reportMissingImports]

        tensors = [_tensor(torch, x) for x in (q, k, v)]
        with sdpa_kernel([getattr(SDPBackend, backend)]):

            def run(q, k, v, **kwargs):
                return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, **kwargs)

            try:
                call, note = _call(run, *tensors, enable_gqa=True), {}
                call()
            except RuntimeError:  # this backend wants as many kv heads as query heads
                ratio = q.shape[0] // k.shape[0]
                tensors[1:] = [x.repeat_interleave(ratio, dim=1) for x in tensors[1:]]
                call, note = _call(run, *tensors), {"note": "kv heads repeated"}
            return note | _checked_and_timed(torch, call, expected, dense_flops(*q.shape), str(q.dtype), repeats)


def _flex(inputs: AttentionInputs, flops: float, repeats: int) -> dict[str, Any]:
    """FlexAttention, compiled, over the same lists of blocks."""
    with _torch() as torch:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention  # pyright: ignore[reportMissingImports]

        counts, tables = flex_tables(jax.tree.map(np.asarray, inputs.index))
        (partial_count, full_count), (partial, full) = (
            [torch.from_numpy(x).cuda() for x in y] for y in (counts, tables)
        )
        block = inputs.index.block_kv
        mask = BlockMask.from_kv_blocks(
            partial_count, partial, full_count, full, BLOCK_SIZE=block, mask_mod=lambda b, h, q, k: q >= k
        )
        q, k, v = (_tensor(torch, x) for x in (inputs.q, inputs.k, inputs.v))
        call = torch.compile(
            lambda: flex_attention(q, k, v, block_mask=mask, scale=inputs.scale, enable_gqa=True), dynamic=False
        )
        return _checked_and_timed(torch, call, sample(inputs), flops, str(inputs.q.dtype), repeats)


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
    counts = [np.ascontiguousarray(x[None]) for x in (index.count - index.num_full, index.num_full)]
    return counts, [partial, full]


def _tensor(torch: Any, x: Any) -> Any:
    """The array as a torch tensor on the device with a leading batch axis; through bytes, as NumPy has no bfloat16."""
    host = torch.from_numpy(np.array(x).view(np.uint8))
    return host.cuda().view(getattr(torch, str(x.dtype)))[None]


def _call(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: run(*args, **kwargs)


def _checked_and_timed(torch, call, expected, flops: float, dtype: str, repeats: int) -> dict[str, Any]:
    """Errors of the output on the sampled rows, then the timing."""
    heads, rows = (torch.from_numpy(x).cuda() for x in (expected.heads, expected.rows))
    out = call()[0, heads, rows].float().cpu().numpy()
    errors = expected.check(out, None, dtype=dtype)
    times = time_calls(call, lambda _: torch.cuda.synchronize(), repeats=repeats)
    return errors | rate(flops, summary(times, compile_ms=0.0)) | {"torch": torch.__version__}
