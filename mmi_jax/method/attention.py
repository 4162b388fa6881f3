"""sparse_attention: plan, permute, attend, undo. The method on one page."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from mmi_jax.layout import TokenLayout
from mmi_jax.method.dense_attention import attend_densely, cudnn_takes, is_plain
from mmi_jax.method.kv_views import Geometry
from mmi_jax.method.patterns.base import Pattern
from mmi_jax.method.patterns.dense import Dense
from mmi_jax.method.plan import Plan, plan_heads, prompt_geometry
from pallas_kernels.attention.api import Backend, Implementation, attend_inputs
from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.device import has_hopper_gpu
from pallas_kernels.notation import Array, Float, Int32
from pallas_kernels.pytree import pytree

type Vendor = Literal["vendor"]
VENDOR: Vendor = "vendor"
"""The device's own dense attention, at any length: cuDNN on a GPU, XLA elsewhere. What a plan stands beside."""


@pytree
class SparseAttention:
    """What attending by plan gives.

    Args:
      out: attention output in q's dtype.
      lse: log-sum-exp of the scaled scores that were visited, float32; -inf for padding. Rounded to q's dtype, and
        without a gradient, where there is no plan.
      plan: the plan of each example, leading axis b on every array; None where nothing had to be planned.
    """

    out: Float[Array, "b t h d"]
    lse: Float[Array, "b h t"]
    plan: Plan | None

    def density(self) -> Float[Array, "b h"]:
        """Visited tiles over the tiles of dense causal attention, float32."""
        if self.plan is None:
            return jnp.ones(self.lse.shape[:2], jnp.float32)
        return jax.vmap(lambda plan: plan.density())(self.plan)


def sparse_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    patterns: Pattern | Sequence[Pattern],
    *,
    layout: TokenLayout,
    q_start: Int32[Array, ""] | int | None = None,
    scale: float | None = None,
    blocks: Blocks | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b t h d"]:
    """Causal attention in which each head visits only what its pattern keeps, in q's dtype; zeros at padding.

    Args:
      q, k, v: as for `jax.nn.dot_product_attention`; query head `h` reads kv head `h // (num_q_heads // num_kv_heads)`.
      patterns: one pattern for all heads, or one for each query head.
      layout: of the `s` kv tokens; fields [s], or [b, s] when the examples differ.
      q_start: the kv token that is the first query, for chunked prefill; `s - t` when None.
      scale: factor on the scores, `d ** -0.5` when None.
      blocks: tile sizes, 128 x 128 when None.
      implementation: see `block_sparse_attention`.

    Raises:
      ValueError: shapes, number of patterns or layout do not fit.

    References:
      MMInference (arXiv 2504.16083), sections 3.1 and 3.2.
    """
    return attend_sparsely(
        q, k, v, patterns, layout=layout, q_start=q_start, scale=scale, blocks=blocks, implementation=implementation
    ).out


def attend_sparsely(
    q, k, v, patterns, *, layout: TokenLayout, geometry: Geometry | None = None, q_start=None,
    scale: float | None = None, blocks: Blocks | None = None, implementation: Backend | Vendor | None = None,
    starts_plain: bool | None = None, padding_is_finite: bool = False,
) -> SparseAttention:  # fmt: skip
    """`sparse_attention` with its plan and log-sum-exp.

    Args:
      implementation: see `block_sparse_attention`; or `VENDOR`, which attends densely or raises NotImplementedError.
      geometry: made before by `batch_geometry` for the same patterns, layout and blocks, so that layers share it.
      starts_plain: whether the queries are a plain prompt's first tokens (see `plain.is_plain`), which a caller under
        jit knows and the traced layout hides; looked up when None. Dense heads alone then need no plan.
      padding_is_finite: the caller knows that padded tokens hold no NaN or infinity, as in a prefill, and does not
        read their output, which may then be any finite number.
    """
    patterns = check_attention(q, k, v, patterns, layout, q_start)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    blocks = blocks or Blocks()
    if implementation == VENDOR or (implementation is None and set(patterns) == {Dense()} and cudnn_takes(q)):
        if starts_plain is None:
            starts_plain = q.shape[1] == k.shape[1] and is_plain(layout)
        if implementation == VENDOR and not (starts_plain and set(patterns) == {Dense()}):
            raise NotImplementedError(f"{VENDOR} takes dense heads of a plain prompt from its first token on")
        if starts_plain:
            vendor = "cudnn" if has_hopper_gpu() else "xla"
            with jax.named_scope("mmi.attend"):
                out, lse = attend_densely(
                    q, k, v, layout=layout, scale=scale, padding_is_finite=padding_is_finite, implementation=vendor
                )
            return SparseAttention(out=out, lse=lse, plan=None)
    assert implementation != VENDOR, "it has attended, or raised"
    if geometry is None:
        geometry = batch_geometry(
            layout, patterns, batch=q.shape[0], num_queries=q.shape[1], q_start=q_start, blocks=blocks
        )

    with jax.named_scope("mmi.plan"):
        plan = plan_batch(patterns, q, k, geometry, scale=scale, blocks=blocks)
    out, lse = attend_by_plan(plan, q, k, v, scale=scale, implementation=implementation)
    return SparseAttention(out=out, lse=lse, plan=plan)


def plan_batch(patterns: Sequence[Pattern], q, k, geometry: Geometry, *, scale: float, blocks: Blocks) -> Plan:
    """The plan of every example of a batch, leading axis b on every array."""
    q, k = jax.lax.stop_gradient((q, k))  # a plan is made of integers; kernels of estimates have no backward pass

    def example(q, k, geometry):
        return plan_heads(patterns, q, k, geometry, scale=scale, blocks=blocks)

    if q.shape[0] == 1:  # half the time to trace a layer is Python's work for an axis of one
        return jax.tree.map(lambda x: x[None], example(*jax.tree.map(lambda x: x[0], (q, k, geometry))))
    return jax.vmap(example)(q, k, geometry)


def batch_geometry(
    layout: TokenLayout, patterns: Sequence[Pattern], *, batch: int, num_queries: int, q_start, blocks: Blocks
) -> Geometry:
    """The geometry of every example of a batch, leading axis b on every array."""
    layout = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (batch, x.shape[-1])), layout)
    q_start = jnp.int32(layout.num_tokens - num_queries if q_start is None else q_start)

    def example(layout):
        return prompt_geometry(layout, patterns, num_queries=num_queries, q_start=q_start, blocks=blocks)

    return jax.vmap(example)(layout)


def attend_by_plan(plan: Plan, q, k, v, *, scale: float, implementation: Backend | None = None):
    """Permute, attend, undo: output `[b, t, h, d]` in q's dtype and log-sum-exp `[b, h, t]` in float32."""
    with jax.named_scope("mmi.permute"):
        inputs = permute(plan, q, k, v, scale=scale)
    with jax.named_scope("mmi.attend"):
        out, lse = attend_inputs(inputs, implementation)
    with jax.named_scope("mmi.undo"):
        return undo(plan, out, lse)


def permute(plan: Plan, q, k, v, *, scale: float) -> AttentionInputs:
    """What a kernel reads: rows in permuted order, keys laid out in views, batch folded into the heads."""
    batch = q.shape[0]
    q_rows = jax.vmap(lambda plan, q: plan.q_order.apply(q.transpose(1, 0, 2)))(plan, q)
    k_view, k_extra = jax.vmap(_lay_out)(k, plan.kv_order), jax.vmap(_gather_extra)(k, plan.extra_order)
    v_view, v_extra = jax.vmap(_lay_out)(v, plan.kv_order), jax.vmap(_gather_extra)(v, plan.extra_order)
    # A padded token may hold NaN, and a weight of 0 does not silence it.
    v_view = jnp.where((plan.kv_order >= 0)[:, None, :, None], v_view, 0)
    v_extra = jnp.where((plan.extra_order >= 0)[..., None], v_extra, 0)
    index = jax.tree.map(_fold, plan.index)
    first_pos_row = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * plan.kv_pos.shape[1]
    return AttentionInputs(
        q=_fold(q_rows),
        k=_fold(k_view),
        v=_fold(v_view),
        k_extra=_fold(k_extra),
        v_extra=_fold(v_extra),
        q_pos=_fold(plan.q_pos),
        kv_pos=_fold(plan.kv_pos),
        index=dataclasses.replace(index, pos_row=_fold(plan.index.pos_row + first_pos_row)),
        scale=scale,
        has_zeroed_padding=True,
    )


def undo(plan: Plan, out: Float[Array, "bh r d"], lse: Float[Array, "bh r"]):
    """Rows back in token order, views merged: output `[b, t, h, d]` and log-sum-exp `[b, h, t]`."""
    batch = plan.kv_order.shape[0]
    out, lse = (x.reshape(batch, -1, *x.shape[1:]) for x in (out, lse))
    out, lse = jax.vmap(lambda plan, out, lse: plan.q_order.merge(out, lse))(plan, out, lse)
    return out.transpose(0, 2, 1, 3), lse


def _fold(x):
    """The batch folded into the head axis."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _lay_out(x, order):
    """Keys or values `[s, g, d]` in the order of the kv view, head-major."""
    if len(order) == x.shape[0]:  # only the prompt's own view, and it needs no padding
        return x.transpose(1, 0, 2)
    return x.at[jnp.maximum(order, 0)].get(mode="promise_in_bounds").transpose(1, 0, 2)


def _gather_extra(x, order):
    """The rows gathered for each query head, `[h, x, d]`."""
    kv_head = jnp.arange(order.shape[0])[:, None] // (order.shape[0] // x.shape[1])
    return x[jnp.maximum(order, 0), kv_head]


def check_attention(q, k, v, patterns, layout: TokenLayout, q_start=None) -> tuple[Pattern, ...]:
    """The patterns, one per query head; raises ValueError for arguments that do not fit each other."""
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"num_q_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q, k, v must agree in batch and head dim: got {q.shape}, {k.shape}, {v.shape}")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"there are more queries than keys: q has {q.shape[1]} tokens, k has {k.shape[1]}")
    if layout.num_tokens != k.shape[1]:
        raise ValueError(f"the layout must describe every kv token: it has {layout.num_tokens}, k has {k.shape[1]}")
    batch, num_layouts = q.shape[0], layout.modality.shape[0] if layout.modality.ndim > 1 else 1
    if num_layouts not in (1, batch):
        raise ValueError(f"the layout must describe 1 example or {batch}, got {num_layouts}")
    if isinstance(q_start, int) and not 0 <= q_start <= k.shape[1] - q.shape[1]:
        raise ValueError(f"queries must lie among the keys: {q_start=} and {q.shape[1]} queries, {k.shape[1]} keys")
    patterns = (patterns,) * num_heads if isinstance(patterns, Pattern) else tuple(patterns)
    if len(patterns) != num_heads:
        raise ValueError(f"patterns must name one pattern for each of the {num_heads} query heads, got {len(patterns)}")
    return patterns
