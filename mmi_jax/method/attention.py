"""Step 9 of 9, attention: plan, permute, attend, undo. The method on one page."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mmi_jax.method.kv_views import Geometry
from mmi_jax.method.plan import Plan, plan_batch
from mmi_jax.method.query_parts import PlansQueries
from pallas_kernels.attention.api import Backend, attend_inputs
from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.notation import AnyArray, Array, Float, Int32


def plan_and_attend(
    patterns: Sequence[PlansQueries],
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    geometry: Geometry,
    *,
    scale: float,
    blocks: Blocks,
    implementation: Backend | None = None,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"], Plan]:
    """Attention of a pattern for each query head: output in q's dtype, log-sum-exp in float32, and the plans."""
    with jax.named_scope("mmi.plan"):
        plan = plan_batch(patterns, q, k, geometry, scale=scale, blocks=blocks)
    out, lse = attend_by_plan(plan, q, k, v, scale=scale, implementation=implementation)
    return out, lse, plan


def attend_by_plan(
    plan: Plan,
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    *,
    scale: float,
    implementation: Backend | None = None,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """Permute, attend, undo: output in q's dtype and log-sum-exp in float32."""
    with jax.named_scope("mmi.permute"):
        inputs = permute(plan, q, k, v, scale=scale)
    with jax.named_scope("mmi.attend"):
        out, lse = attend_inputs(inputs, implementation)
    with jax.named_scope("mmi.undo"):
        return undo(plan, out, lse)


def permute(
    plan: Plan, q: Float[Array, "b t h d"], k: Float[Array, "b s g d"], v: Float[Array, "b s g d"], *, scale: float
) -> AttentionInputs:
    """The arguments of a kernel: rows in permuted order, keys in the kv view, batch folded into the heads."""
    q_rows = jax.vmap(lambda plan, q: plan.q_order.apply(q.transpose(1, 0, 2)))(plan, q)
    k_view, k_gathered = jax.vmap(_in_view_order)(k, plan.kv_order), jax.vmap(_gather)(k, plan.gathered_order)
    v_view, v_gathered = jax.vmap(_in_view_order)(v, plan.kv_order), jax.vmap(_gather)(v, plan.gathered_order)
    # A padded token may hold NaN, and NaN times a weight of 0 is NaN.
    v_view = jnp.where((plan.kv_order >= 0)[:, None, :, None], v_view, 0)
    v_gathered = jnp.where((plan.gathered_order >= 0)[..., None], v_gathered, 0)
    index = jax.tree.map(_fold, plan.index)
    first_pos_row = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None, None] * plan.kv_pos.shape[1]
    return AttentionInputs(
        q=_fold(q_rows),
        k=_fold(k_view),
        v=_fold(v_view),
        k_extra=_fold(k_gathered),
        v_extra=_fold(v_gathered),
        q_pos=_fold(plan.q_pos),
        kv_pos=_fold(plan.kv_pos),
        index=dataclasses.replace(index, pos_row=_fold(plan.index.pos_row + first_pos_row)),
        scale=scale,
        has_zeroed_padding=True,
    )


def undo(
    plan: Plan, out: Float[Array, "bh r d"], lse: Float[Array, "bh r"]
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """Rows back in token order, passes over the same queries merged."""
    batch = plan.kv_order.shape[0]
    out, lse = (x.reshape(batch, -1, *x.shape[1:]) for x in (out, lse))
    out, lse = jax.vmap(lambda plan, out, lse: plan.q_order.merge(out, lse))(plan, out, lse)
    return out.transpose(0, 2, 1, 3), lse


def _fold(x: AnyArray) -> Array:
    """The batch folded into the head axis."""
    return jnp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))


def _in_view_order(x: Float[Array, "s g d"], order: Int32[Array, " sv"]) -> Float[Array, "g sv d"]:
    """Keys or values in the order of the kv view, head-major."""
    if len(order) == x.shape[0]:  # only the prompt's view, and it needs no padding
        return x.transpose(1, 0, 2)
    return x.at[jnp.maximum(order, 0)].get(mode="promise_in_bounds").transpose(1, 0, 2)


def _gather(x: Float[Array, "s g d"], order: Int32[Array, "h x"]) -> Float[Array, "h x d"]:
    """The rows gathered for each query head."""
    kv_head = jnp.arange(order.shape[0])[:, None] // (order.shape[0] // x.shape[1])
    return x[jnp.maximum(order, 0), kv_head]
