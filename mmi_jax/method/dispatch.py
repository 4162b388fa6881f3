"""sparse_attention: checks the arguments, then runs the patterns' plan or the vendor's dense kernel.

The choice is one floor above the method because a vendor's kernel knows neither plans nor layouts: it takes dense heads
only, and only of a prompt in which every token's position equals its index: there dense attention is causal attention.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mmi_jax.layout import TokenIndex, TokenLayout
from mmi_jax.method.attention import plan_and_attend
from mmi_jax.method.checks import check_attention, per_head
from mmi_jax.method.kv_views import Geometry
from mmi_jax.method.patterns.base import Pattern
from mmi_jax.method.patterns.dense import Dense
from mmi_jax.method.plan import Plan, batch_geometry
from pallas_kernels.attention.api import Backend, Implementation
from pallas_kernels.block_lists.block_sizes import Blocks
from pallas_kernels.device import has_hopper_gpu
from pallas_kernels.notation import Array, Float
from pallas_kernels.pytree import pytree

type Vendor = Literal["vendor"]
VENDOR: Vendor = "vendor"
"""Dense attention by the vendor of the device, at any length: cuDNN on a GPU, XLA elsewhere. Baseline of the plans."""

CUDNN_TOKENS = 16_384
"""Up to here cuDNN's dense kernel is faster than ours with its plan; from 32K tokens ours is (bench/RESULTS.md)."""


@pytree
class SparseAttention:
    """What `attend_sparsely` gives.

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
    q_start: TokenIndex | None = None,
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
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    patterns: Pattern | Sequence[Pattern],
    *,
    layout: TokenLayout,
    geometry: Geometry | None = None,
    q_start: TokenIndex | None = None,
    scale: float | None = None,
    blocks: Blocks | None = None,
    implementation: Backend | Vendor | None = None,
    position_is_index: bool | None = None,
    padding_is_finite: bool = False,
) -> SparseAttention:
    """`sparse_attention` with its plan and log-sum-exp.

    Args:
      implementation: see `block_sparse_attention`; or `VENDOR`, which attends densely or raises NotImplementedError.
      geometry: made before by `batch_geometry` for the same patterns, layout and blocks: one for all layers of these.
      position_is_index: whether the queries are the prompt's first tokens and `position_equals_index` holds of it,
        which a caller under jit knows and the traced layout hides; looked up when None. Dense heads alone then need no
        plan.
      padding_is_finite: the caller knows that padded tokens hold no NaN or infinity, as in a prefill, and does not
        read their output, which may then be any finite number.
    """
    check_attention(q, k, v, layout, q_start)
    patterns = per_head(patterns, q.shape[2])
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if _takes_vendor(q, k, patterns, layout, implementation, position_is_index):
        with jax.named_scope("mmi.attend"):
            vendor = "cudnn" if has_hopper_gpu() else "xla"
            out, lse = attend_densely(
                q, k, v, layout=layout, scale=scale, padding_is_finite=padding_is_finite, implementation=vendor
            )
        return SparseAttention(out=out, lse=lse, plan=None)
    assert implementation != VENDOR, "it has attended, or raised"
    blocks = blocks or Blocks()
    if geometry is None:
        geometry = batch_geometry(
            layout, patterns, batch=q.shape[0], num_queries=q.shape[1], q_start=q_start, blocks=blocks
        )
    out, lse, plan = plan_and_attend(
        patterns, q, k, v, geometry, scale=scale, blocks=blocks, implementation=implementation
    )
    return SparseAttention(out=out, lse=lse, plan=plan)


def position_equals_index(layout: TokenLayout) -> bool:
    """Whether every token's position is its index, padding last; False for a traced layout, which hides it."""
    if isinstance(layout.pos, Tracer):
        return False
    pos = np.asarray(layout.pos)
    is_real = np.asarray(layout.is_real)
    index = np.arange(pos.shape[-1])
    is_padded_last = is_real == (index < is_real.sum(axis=-1, keepdims=True))
    return bool(is_padded_last.all() and (pos == index)[is_real].all())


def cudnn_takes(q: Float[Array, "b t h d"]) -> bool:
    """Whether cuDNN serves dense attention of these queries, and is the faster choice."""
    is_16_bit = q.dtype in (jnp.bfloat16, jnp.float16)
    return has_hopper_gpu() and is_16_bit and q.shape[3] <= 128 and q.shape[3] % 8 == 0 and q.shape[1] <= CUDNN_TOKENS


def attend_densely(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    *,
    layout: TokenLayout,
    scale: float,
    padding_is_finite: bool = False,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """Causal attention of the first tokens of a prompt whose positions equal indices: output, and log-sum-exp.

    The log-sum-exp is float32, but JAX has rounded it to q's dtype before, and no gradient flows through it.

    Zeros and -inf at padding, as from a plan; where `padding_is_finite`, which saves two passes (5 % at 4K tokens),
    finite numbers instead of zeros. Keys past the last query are not read.
    """
    num_tokens = q.shape[1]
    k, v = k[:, :num_tokens], v[:, :num_tokens]
    is_query = jnp.atleast_2d(jnp.asarray(layout.is_real)[..., :num_tokens])
    if not padding_is_finite:
        k, v = (jnp.where(is_query[..., None, None], x, 0) for x in (k, v))
    out, lse = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation=implementation, return_residual=True
    )
    if not padding_is_finite:
        out = jnp.where(is_query[..., None, None], out, 0)
    return out, jnp.where(is_query[..., None], lse.astype(jnp.float32), -jnp.inf).transpose(0, 2, 1)


def _takes_vendor(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    patterns: tuple[Pattern, ...],
    layout: TokenLayout,
    implementation: Backend | Vendor | None,
    position_is_index: bool | None,
) -> bool:
    """Whether the vendor's kernel runs; raises NotImplementedError if it is named and cannot."""
    is_dense = set(patterns) == {Dense()}
    if implementation != VENDOR and not (implementation is None and is_dense and cudnn_takes(q)):
        return False
    if position_is_index is None:
        position_is_index = q.shape[1] == k.shape[1] and position_equals_index(layout)
    if implementation == VENDOR and not (position_is_index and is_dense):
        raise NotImplementedError(
            f"{VENDOR} takes dense heads of the first tokens of a prompt whose positions equal indices"
        )
    return position_is_index
