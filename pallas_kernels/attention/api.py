"""block_sparse_attention: checks, the choice of a backend, and nothing else."""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference, xla
from pallas_kernels.attention.hopper import mosaic_gpu
from pallas_kernels.attention.inputs import AttentionInputs, check_inputs
from pallas_kernels.attention.tpu import mosaic_tpu
from pallas_kernels.block_index import BlockIndex
from pallas_kernels.dispatch import run_backend
from pallas_kernels.notation import Array, Float, Int32

Implementation = Literal["reference", "xla", "mosaic_gpu", "mosaic_tpu"]
Backend = Implementation | xla.Attend
"""A backend by name, or a function of `AttentionInputs` to run in its place: for a chip that is not attached."""

_BACKENDS: dict[Implementation, xla.Attend] = {
    "reference": reference.attend,
    "xla": xla.with_gradients(xla.attend),
    "mosaic_gpu": xla.with_gradients(mosaic_gpu.attend),
    "mosaic_tpu": xla.with_gradients(mosaic_tpu.attend),
}

DEFAULT_ORDER: tuple[Implementation, ...] = ("mosaic_gpu", "mosaic_tpu", "xla")
"""What `implementation=None` tries, in this order, until one does not refuse."""


def block_sparse_attention(
    q: Float[Array, "h t d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s d"],
    index: BlockIndex,
    *,
    q_pos: Int32[Array, "h t"],
    kv_pos: Int32[Array, "n sx"],
    scale: float | None = None,
    k_extra: Float[Array, "h x d"] | None = None,
    v_extra: Float[Array, "h x d"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "h t d"], Float[Array, "h t"]]:
    """Attention over the visited blocks only: the output in q's dtype and the log-sum-exp in float32.

    A pair inside a visited block is attended iff the block is full, or `kv_pos <= q_pos` and the distance
    `q_pos - kv_pos` lies in the entry's interval. A query that attends nothing gives exact zeros and -inf.
    Differentiable in q, k, v and the extra rows; the backward pass of every kernel is XLA's.

    Args:
      q: queries, head-major; batch is folded into the head axis; `t = num_q_blocks * block_q`.
      k, v: the kv view that the heads share; head `h` reads kv head `h // (num_q_heads // num_kv_heads)`.
      index: which blocks each q block visits.
      q_pos: position of each query row; -1 (`PAD_Q_POS`) for rows that attend nothing.
      kv_pos: rows of key positions along `k` followed by `k_extra`, chosen by `index.pos_row`; `PAD_KV_POS` for keys
        that no query attends. Such rows may hold anything, NaN included, as may blocks that no q block visits.
      scale: factor on the scores, `d ** -0.5` when None.
      k_extra, v_extra: rows gathered for each query head, addressed by block starts from `s` on.
      implementation: a named backend runs or raises; None walks `DEFAULT_ORDER`.

    Raises:
      ValueError: the arguments do not fit each other, or the implementation's name is unknown.
      NotImplementedError: the named backend cannot take this input; the message names the limit.
      ExceptionGroup: no backend takes this input; holds each one's reason.
    """
    if (k_extra is None) != (v_extra is None):
        raise ValueError("k_extra and v_extra come together: one of them is None")
    if k_extra is None or v_extra is None:
        k_extra = v_extra = jnp.zeros((q.shape[0], 0, q.shape[2]), q.dtype)
    inputs = AttentionInputs(
        q=q,
        k=k,
        v=v,
        k_extra=k_extra,
        v_extra=v_extra,
        q_pos=q_pos,
        kv_pos=kv_pos,
        index=jax.tree.map(jnp.asarray, index),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
    return attend_inputs(inputs, implementation)


def attend_inputs(
    inputs: AttentionInputs, implementation: Backend | None = None
) -> tuple[Float[Array, "h t d"], Float[Array, "h t"]]:
    """`block_sparse_attention` of arguments that are put together already."""
    check_inputs(inputs)
    if callable(implementation):
        return implementation(inputs)
    return run_backend(_BACKENDS, DEFAULT_ORDER, implementation, inputs)
